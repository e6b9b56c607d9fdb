"""The method itself: score the prompt's tokens before some layers of a prefill, cut, go on with a shorter sequence.

Start with `prefill` (score, cut, shorten). `engine` is the ``with``, `session` what its hooks do, `continuation`
decoding and later turns, `pruned_cache` what a cache remembers, `stage` what a scorer sees, `earlier_layers` what it
may read of those, `selection` who stays, `trace` what happened, `token_fates` the same as a table, `generate_guard`
what ``generate`` may not do.
"""
