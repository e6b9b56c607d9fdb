"""What ``python -m sdtp_lib`` can do: a module for each command, which reads arguments, calls the library and prints.

A command loads torch after its arguments are read, so that ``--help`` and a misspelt option answer at once. Errors are
left to ``sdtp_lib.__main__``, which says them in one sentence.
"""
