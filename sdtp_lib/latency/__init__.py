"""What pruning saves: time, memory and bytes, measured beside the limit; and a cost model that predicts them.

`measure` times calls, `memory` watches their peak, `generation` splits prefill from decoding, `hardware` gives this
machine's rates, `variants` are what is timed, `run` times them into rows, `report` reads the rows, `cost_model`
predicts, `training_cost` is what labels and training take.
"""
