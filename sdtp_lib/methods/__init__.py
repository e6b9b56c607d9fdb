"""Every way to shorten a prefill under its own name, and the one call that takes any of them.

`call` is what users import: ``from sdtp_lib import token_pruning``.
"""
