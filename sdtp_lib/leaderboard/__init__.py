"""Every method at equal prefill FLOPs on the same items: one table of what each loses and saves.

`entrants` are the variants that take part, `plan` is which item is measured when, `measure` makes rows of one item,
`committed` keeps rows small enough for the repository, `tables` and `words` read them, `page` is docs/leaderboard.md,
`blocks` and `opening` are what README and docs/results.md show.
"""
