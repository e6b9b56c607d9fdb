"""Several devices: accelerate, tensor parallelism with two ranks on the CPU, and a GPU where there is one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sdtp_lib import PruningConfig, TokenPruners, scorers, token_pruning

CONFIG = PruningConfig(layers=(1, 3, 4), keep_ratio=0.6, min_local_tokens=4)
PROMPT = torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(5))


# transformers 5.2's own `generate` takes an offloaded model for one on another device than its input.
offloaded = pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids`:UserWarning")


def _ids(model, scorer=None, prompt=PROMPT, **arguments):
    with token_pruning(model, CONFIG, scorer or scorers.attention(4)) as trace:
        ids = model.generate(prompt, max_new_tokens=8, do_sample=False, **arguments)
    return ids, trace


@offloaded
@pytest.mark.parametrize("place", ["offload", "disk"])
def test_a_model_dispatched_by_accelerate_gives_the_same_ids(tiny_model, place, tmp_path):
    from accelerate import cpu_offload, disk_offload

    expected, plain_trace = _ids(tiny_model())
    model = tiny_model()
    if place == "offload":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path, execution_device="cpu")
    ids, trace = _ids(model)
    assert torch.equal(ids, expected)
    assert trace.tokens_per_layer == plain_trace.tokens_per_layer


@offloaded
def test_learned_pruners_serve_a_dispatched_model(tiny_model):
    from accelerate import cpu_offload

    torch.manual_seed(0)
    pruners = TokenPruners(hidden_size=32, layers=(1, 3, 4))
    expected, _ = _ids(tiny_model(), pruners)
    model = tiny_model()
    cpu_offload(model, execution_device="cpu")
    assert torch.equal(_ids(model, pruners)[0], expected)


def test_tables_are_cut_on_the_device_that_they_are_on():
    from sdtp_lib.pruning.selection import gather_tokens

    table = torch.empty(1, 8, 4, device="meta")  # stands for a second device; the columns are on the CPU
    cut = gather_tokens(table, torch.tensor([[0, 3]]))
    assert (cut.device.type, cut.shape) == ("meta", (1, 2, 4))


_RANK = textwrap.dedent(
    """
    import json, sys
    import torch, torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM
    from sdtp_lib import PruningConfig, scorers, token_pruning

    folder, rank = sys.argv[1], int(sys.argv[2])
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
    weight = model.model.layers[0].self_attn.q_proj.weight
    local_rows = (weight.to_local() if hasattr(weight, "to_local") else weight).shape[0]
    prompt = torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(5))
    config = PruningConfig(layers=(1, 3, 4), keep_ratio=0.6, min_local_tokens=4)
    with token_pruning(model, config, scorers.hidden_norm()) as trace:
        ids = model.generate(prompt, max_new_tokens=8, do_sample=False)
    kept = {layer: positions[0].tolist() for layer, positions in trace.kept_positions.items()}
    json.dump({"ids": ids.tolist(), "kept": kept, "local_rows": local_rows}, open(f"{folder}/rank{rank}.json", "w"))
    dist.barrier()
    dist.destroy_process_group()
    """
)


def test_two_tensor_parallel_ranks_give_the_ids_of_one_and_keep_the_same_tokens(tiny_model, tmp_path):
    import json

    model = tiny_model()
    model.save_pretrained(tmp_path)
    expected, trace = _ids(model, scorers.hidden_norm())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(tmp_path), str(rank)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    logs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(log[-3000:] for log in logs)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["local_rows"] == 16, "32 rows of q_proj should be split over two ranks"
    assert found[0]["ids"] == expected.tolist()
    assert found[0]["kept"] == {str(layer): kept[0].tolist() for layer, kept in trace.kept_positions.items()}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_on_a_gpu_the_prefill_waits_for_nothing_and_gives_the_cpus_tokens(tiny_model):
    expected, trace = _ids(tiny_model(dtype=torch.float64))
    model = tiny_model(dtype=torch.float64).cuda()
    ids, gpu_trace = _ids(model, prompt=PROMPT.cuda())
    assert torch.equal(ids.cpu(), expected)
    assert torch.equal(gpu_trace.kept_positions[4].cpu(), trace.kept_positions[4])
    prompt = PROMPT.cuda()  # this waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad(), token_pruning(model, CONFIG, scorers.attention(4)):
            model(input_ids=prompt, use_cache=True, logits_to_keep=1)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_flash_attention_decodes_from_the_pruned_cache(tiny_model):
    pytest.importorskip("flash_attn")
    half = {"dtype": torch.bfloat16, "head_dim": 32, "hidden_size": 128}
    expected, _ = _ids(tiny_model(**half).cuda(), scorers.recency(), PROMPT.cuda())
    model = tiny_model(attn_implementation="flash_attention_2", **half).cuda()
    ids, trace = _ids(model, scorers.recency(), PROMPT.cuda())
    assert trace.tokens_per_layer == [64, 38, 38, 22, 13, 13]
    assert (ids == expected).float().mean() > 0.9
