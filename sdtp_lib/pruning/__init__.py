"""The method itself: score the prompt's tokens before some layers of a prefill, cut, go on with a shorter sequence.

Start with `prefill`. A forward goes through these:

    engine           the ``with``: puts hooks on the model     session           what the hooks do
    prefill          score, cut, shorten what follows          continuation      decoding and later turns
    stage            what a scorer sees                        selection         which tokens stay
    plan             how many stay, known beforehand           trace             what happened

Around them:

    earlier_layers   attention of earlier layers, for scorers  far_sight         the same where layers see a window
    packed_prefill   rows of unlike length, no padding         second_pass       choose first, then run all layers
    chunks           a prompt in chunks, each cut              chunked_prompt    the tokens of such a prompt
    cut_record       which columns each layer holds            pruned_cache      a cache that remembers them
    kv_budget        a cache cut after the prefill             cache_files       a pruned cache on disk
    protection       tokens that a person names                protected_columns the same per forward
    generate_guard   what ``generate`` may not do              remarks           why nothing was pruned
    verify           is the pruned model right?                masked_reference  the slow model that it is held against
    token_fates      the trace as a table, for pictures
"""
