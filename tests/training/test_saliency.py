"""Labels against independent computations: captum, an explicit attention bias in float64, finite removal."""

from __future__ import annotations

import inspect
import time

import pytest
import torch
import torch.nn.functional as F

from sdtp_lib.architectures.attention_bias import attention_mask_out
from sdtp_lib.architectures.layers import decoder_layers, pad_left
from sdtp_lib.training.labels import DEFAULT_LABEL, LABELS, block_effects, saliency_of
from sdtp_lib.training.saliency import compute_saliency, stored_inputs
from sdtp_lib.training.trainer import train_pruners

LAYERS = (1, 2)


def inputs(rows=1, prompt=20, response=5, seed=0, vocabulary=100):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, prompt + response), generator=generator)
    answers = torch.zeros_like(ids)
    answers[:, prompt:] = 1
    return ids, torch.ones_like(ids), answers


def response_loss(model, ids, prompt, **options):
    logits = model(ids, use_cache=False, **options).logits[:, prompt - 1 : -1]
    return F.cross_entropy(logits.transpose(1, 2).double(), ids[:, prompt:], reduction="sum")


def test_gradient_x_hidden_equals_captums(tiny_model):
    captum = pytest.importorskip("captum.attr")
    model = tiny_model().double()
    ids, mask, answers = inputs()
    mine = saliency_of(model, ids, mask, answers, LAYERS, "gradient_x_hidden")

    def loss_from(embeddings):
        return response_loss_from(model, embeddings, ids).reshape(1)

    def response_loss_from(model, embeddings, ids):
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[:, 19:-1]
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 20:], reduction="sum")

    for layer in LAYERS:
        # The input of layer l is the output of layer l - 1.
        attribution = captum.LayerGradientXActivation(loss_from, decoder_layers(model)[layer - 1])
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        theirs = attribution.attribute(embeddings).sum(-1).abs()
        torch.testing.assert_close(mine[layer].double(), theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("by_head", [False, True])
def test_removal_equals_an_explicit_bias_matrix_in_float64(tiny_model, by_head):
    model = tiny_model().double()
    ids, mask, answers = inputs()
    label = "removal_by_head" if by_head else "removal"
    mine = saliency_of(model, ids, mask, answers, LAYERS, label)
    depth, groups = model.config.num_hidden_layers, model.config.num_key_value_heads
    heads = model.config.num_attention_heads
    tokens = ids.shape[1]
    causal = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    biases = [torch.zeros(1, groups, 1, tokens, dtype=torch.float64, requires_grad=True) for _ in range(depth)]
    handles = []
    for layer, bias in zip(decoder_layers(model), biases, strict=True):

        def with_bias(_module, args, kwargs, bias=bias):
            wide = bias.repeat_interleave(heads // groups, dim=1)
            return args, {**kwargs, "attention_mask": causal + wide.expand(1, heads, tokens, tokens)}

        handles.append(layer.register_forward_pre_hook(with_bias, with_kwargs=True))
    gradients = torch.autograd.grad(response_loss(model, ids, 20), biases)
    for handle in handles:
        handle.remove()
    for layer in LAYERS:
        later = [g[:, :, 0] for g in gradients[layer:]]
        expected = sum(g.abs().sum(1) if by_head else g.sum(1).abs() for g in later)
        torch.testing.assert_close(mine[layer].double(), expected, rtol=1e-5, atol=1e-9)


def test_removal_predicts_what_a_slightly_weakened_key_costs(tiny_model):
    """First order: scaling a key's attention weight by 1 - e changes the loss by e times the joint label."""
    model = tiny_model().double()
    ids, mask, answers = inputs()
    label = saliency_of(model, ids, mask, answers, (1,), "removal_joint")[1]
    before = response_loss(model, ids, 20)
    for token in (0, 7, 19):
        keep = torch.ones(1, ids.shape[1], dtype=torch.float64)
        keep[:, token] = 1 - 1e-3
        with attention_mask_out(model, {1: keep}):
            after = response_loss(model, ids, 20)
        assert abs(float(after - before)) / 1e-3 == pytest.approx(label[0, token].item(), rel=2e-2, abs=1e-4)


def test_the_label_of_a_cut_prompt_predicts_what_a_weakened_key_costs_there(tiny_model):
    model = tiny_model().double()
    ids, mask, answers = inputs()
    cut = {1: torch.ones(1, ids.shape[1], dtype=torch.float64)}
    cut[1][:, 3:9] = 0
    label = saliency_of(model, ids, mask, answers, (2,), "removal_joint", cut)[2]
    with attention_mask_out(model, cut):
        before = response_loss(model, ids, 20)
    assert label[0, 3:9].max() < 1e-4 < label[0, 9:20].min(), "what is gone cannot be removed again"
    for token in (0, 12, 19):
        weak = torch.ones(1, ids.shape[1], dtype=torch.float64)
        weak[:, token] = 1 - 1e-3
        with attention_mask_out(model, {**cut, 2: weak}):
            after = response_loss(model, ids, 20)
        assert abs(float(after - before)) / 1e-3 == pytest.approx(label[0, token].item(), rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_the_entropy_of_a_cut_prompt_is_that_of_the_tokens_left(tiny_model, family):
    """It was that of all tokens: those that earlier stages had dropped took part, and had labels of their own."""
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64} if family == "gpt_oss" else {}
    model = tiny_model(family, attn_implementation="eager", **more)
    ids, mask, answers = inputs()
    keep = torch.ones(1, 25)
    keep[0, 3:11] = 0
    found = saliency_of(model, ids, mask, answers, LAYERS, "attention_entropy", {0: keep})
    seen = torch.ones(25, 25).tril().bool() & keep[0].bool()
    seen = torch.zeros(1, 1, 25, 25).masked_fill(~seen, torch.finfo(torch.float32).min)
    seen = dict.fromkeys(("full_attention", "sliding_attention"), seen) if more else seen
    attentions = model(ids, attention_mask=seen, use_cache=False, output_attentions=True).attentions
    for layer in LAYERS:
        paid = attentions[layer][0, :, 20:]
        torch.testing.assert_close(found[layer][0], -torch.xlogy(paid, paid).mean((0, 1)), rtol=2e-3, atol=1e-5)


def test_a_loss_mask_leaves_response_tokens_out_of_the_label(tiny_model, tmp_path):
    model = tiny_model()
    ids, mask, answers = inputs()
    answers[:, 21:24] = 0
    expected = saliency_of(model, ids, mask, answers, LAYERS)
    sample = {"id": "a", "prompt_ids": ids[0, :20].tolist(), "response_ids": ids[0, 20:].tolist()}
    sample["loss_mask"] = [True, False, False, False, True]
    (row,) = compute_saliency(model, [sample], LAYERS, cache_dir=tmp_path, progress=False)
    for layer in LAYERS:
        torch.testing.assert_close(torch.tensor(row[f"layer_{layer}"]), expected[layer][0, :20])
    with pytest.raises(ValueError, match="loss_mask of sample 'a' has 2 entries"):
        compute_saliency(model, [{**sample, "loss_mask": [True, False]}], LAYERS, cache_dir=tmp_path)


@pytest.mark.parametrize("label", LABELS)
def test_a_padded_row_is_labelled_like_the_row_alone(tiny_model, label):
    model = tiny_model()
    short, _, _ = inputs(prompt=12, seed=1)
    long, _, _ = inputs(prompt=20, seed=2)
    ids, mask = pad_left([short[0].tolist(), long[0].tolist()])
    answers = torch.zeros_like(ids)
    answers[:, -5:] = 1
    together = saliency_of(model, ids, mask, answers, LAYERS, label)
    for row, alone in enumerate((short, long)):
        own = torch.zeros_like(alone)
        own[:, -5:] = 1
        expected = saliency_of(model, alone, torch.ones_like(alone), own, LAYERS, label)
        for layer in LAYERS:
            start = ids.shape[1] - alone.shape[1]
            assert (together[layer][row, :start] == 0).all()
            torch.testing.assert_close(together[layer][row, start:], expected[layer][0], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("label", LABELS)
def test_a_row_is_labelled_the_same_beside_one_with_a_longer_response(tiny_model, label):
    """The signs of ``removal_odds`` went by the batch's columns, so that labels hung on who stood beside a prompt."""
    model = tiny_model()
    ids, _, _ = inputs(prompt=12, seed=1)
    answers = torch.zeros_like(ids)
    answers[:, -5:] = 1
    alone = saliency_of(model, ids, torch.ones_like(ids), answers, LAYERS, label)
    two = torch.cat([ids, inputs(prompt=12, seed=2)[0]])
    answers = torch.cat([answers, torch.zeros_like(answers)])
    answers[1, -9:] = 1
    together = saliency_of(model, two, torch.ones_like(two), answers, LAYERS, label)
    for layer in LAYERS:
        torch.testing.assert_close(together[layer][0], alone[layer][0], rtol=2e-3, atol=1e-7)


def test_several_labels_at_once_equal_each_alone_and_leave_no_weight_gradient(tiny_model):
    model = tiny_model().requires_grad_(True)
    ids, mask, answers = inputs()
    wanted = ("gradient_x_hidden", "removal", "removal_odds")
    together = saliency_of(model, ids, mask, answers, LAYERS, wanted)
    assert all(parameter.grad is None for parameter in model.parameters())
    for label in wanted:
        for layer, values in saliency_of(model, ids, mask, answers, LAYERS, label).items():
            torch.testing.assert_close(values, together[label][layer])
            assert values.max() > 0


def test_tokens_that_come_after_the_loss_have_no_saliency(tiny_model):
    model = tiny_model()
    ids, mask, answers = inputs()
    answers = torch.zeros_like(answers)
    answers[:, 10:12] = 1
    for label in ("gradient_x_hidden", "removal"):
        found = saliency_of(model, ids, mask, answers, LAYERS, label)
        assert found[1][:, 11:].abs().max() == 0
        assert found[1][:, :10].min() >= 0 and found[1][:, :10].max() > 0


@pytest.mark.parametrize(
    ("change", "match"),
    [({"label": "smell"}, "smell"), ({"layers": (99,)}, r"layers=\[99\]"), ({"response": "none"}, "response_mask")],
)
def test_wrong_uses_are_named(tiny_model, change, match):
    ids, mask, answers = inputs()
    if change.pop("response", None):
        answers = torch.zeros_like(answers)
    with pytest.raises(ValueError, match=match):
        saliency_of(tiny_model(), ids, mask, answers, **{"layers": LAYERS, "label": "removal", **change})


def samples(count=4):
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "id": f"s{i}",
            "category": "c",
            "prompt_ids": torch.randint(3, 100, (10 + 3 * i,), generator=generator).tolist(),
            "response_ids": torch.randint(3, 100, (3,), generator=generator).tolist(),
        }
        for i in range(count)
    ]


def test_labels_are_keyed_by_sample_id_whatever_the_order(tiny_model, tmp_path):
    """An earlier reproduction shuffled its two stages differently, and labels belonged to other samples."""
    model = tiny_model()
    forward = compute_saliency(model, samples(), LAYERS, cache_dir=tmp_path / "a", progress=False)
    backward = compute_saliency(model, samples()[::-1], LAYERS, cache_dir=tmp_path / "b", progress=False, batch_size=3)
    by_id = {row["sample_id"]: row for row in backward}
    for row, sample in zip(forward, samples(), strict=True):
        assert row["sample_id"] == sample["id"]
        assert row["input_ids"] == sample["prompt_ids"] + sample["response_ids"]
        assert len(row["layer_1"]) == row["prompt_length"] == len(sample["prompt_ids"])
        torch.testing.assert_close(
            torch.tensor(row["layer_1"]), torch.tensor(by_id[row["sample_id"]]["layer_1"]), rtol=1e-3, atol=1e-6
        )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for the old name
def test_labels_of_a_model_with_adapters_are_not_taken_for_those_without(tiny_model, tmp_path):
    """Labels were kept under one key with LoRA on and off."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.ones_like(weight))

    def labels():
        rows = compute_saliency(model.eval(), samples(1), LAYERS, cache_dir=tmp_path, progress=False)
        return torch.tensor(rows[0]["layer_1"]), len(list((tmp_path / "saliency").iterdir()))

    on, _ = labels()
    with model.disable_adapter():
        off, folders = labels()
    assert not torch.allclose(on, off) and folders == 2
    assert torch.equal(labels()[0], on) and labels()[1] == 2, "the first labels are still there"
    with torch.no_grad():
        model.base_model.model.model.layers[2].self_attn.q_proj.lora_A["default"].weight.mul_(3)
    assert labels()[1] == 3, "trained on, another adapter"


def test_one_default_label_everywhere():
    """`saliency_of` had another default than `compute_saliency` and `train_pruners`."""
    defaults = {
        inspect.signature(f).parameters["label"].default for f in (saliency_of, compute_saliency, train_pruners)
    }
    assert defaults == {DEFAULT_LABEL} == {"removal"}


def test_a_killed_label_pass_goes_on_where_it_stopped(tiny_model, tmp_path, monkeypatch):
    model, calls = tiny_model(), []
    from sdtp_lib.training import saliency

    inner = saliency.saliency_of

    def counted(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args[1].shape)
        return inner(*args)

    monkeypatch.setattr(saliency, "saliency_of", counted)
    with pytest.raises(KeyboardInterrupt):
        compute_saliency(model, samples(), LAYERS, cache_dir=tmp_path, progress=False)
    calls.clear()
    monkeypatch.setattr(saliency, "saliency_of", lambda *args: calls.append(1) or inner(*args))
    assert len(compute_saliency(model, samples(), LAYERS, cache_dir=tmp_path, progress=False)) == 4
    assert len(calls) == 2
    compute_saliency(model, samples(), LAYERS, cache_dir=tmp_path, progress=False)
    assert len(calls) == 2


def test_stored_hidden_states_are_what_enters_the_layer(tiny_model, tmp_path):
    model = tiny_model()
    rows = compute_saliency(model, samples(2), LAYERS, cache_dir=tmp_path, progress=False, store_hidden=True)
    ids = torch.tensor([samples(2)[1]["prompt_ids"]])
    expected = model(ids, output_hidden_states=True).hidden_states[2][0]
    stored = stored_inputs(rows[1]["file"], (2,))["hidden"][0]
    torch.testing.assert_close(stored.float(), expected, rtol=1e-2, atol=1e-2)


def test_loss_on_continuation_answers_with_the_models_own_words(tiny_model, tmp_path):
    model = tiny_model()
    own = compute_saliency(model, samples(1), (1,), loss_on="continuation", cache_dir=tmp_path, progress=False)
    length = len(samples(1)[0]["prompt_ids"])
    greedy = model.generate(torch.tensor([samples(1)[0]["prompt_ids"]]), max_new_tokens=64, do_sample=False)[0]
    assert own[0]["input_ids"][: len(greedy)] == greedy.tolist()
    assert own[0]["prompt_length"] == length


def test_two_samples_of_one_id_and_empty_ones_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="share an id"):
        compute_saliency(tiny_model(), [*samples(1), *samples(1)], LAYERS, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="empty"):
        compute_saliency(tiny_model(), [{"id": "x", "prompt_ids": [], "response_ids": [1]}], LAYERS, cache_dir=tmp_path)


def test_block_effects_are_largest_where_the_label_is(tiny_model):
    model = tiny_model()
    ids, _, answers = inputs(prompt=32)
    effects = block_effects(model, ids, answers, layer=1, block_tokens=8)
    assert effects.shape == (4,)
    assert (effects >= -1e-6).all()
    # The last block stands right before the response; removing nothing costs nothing.
    keep = torch.ones(1, ids.shape[1])
    with attention_mask_out(model, {1: keep}):
        same = model(ids, use_cache=False).logits
    torch.testing.assert_close(same, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.embedded
def test_the_label_pass_costs_at_most_a_quarter_more_than_forward_and_backward(embedded):
    model, _ = embedded
    ids, mask, answers = inputs(prompt=512, response=32, vocabulary=4000)

    def plain():
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=33).logits
        torch.autograd.grad(logits.sum(), embeddings)

    def labels():
        saliency_of(model, ids, mask, answers, tuple(range(4, 30, 3)), ("gradient_x_hidden", "removal"))

    ratios = []
    for _ in range(4):
        times = []
        for function in (plain, labels):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    assert sorted(ratios)[1] < 1.25


def test_labels_that_are_no_numbers_are_refused_by_the_samples_name_and_not_kept(tiny_model, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[100] = float("nan")
    good, bad = ({"id": name, "prompt_ids": [*range(5, 40), token], "response_ids": [7, 8]}
                 for name, token in (("a", 9), ("b", 100)))  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"sample 'b': its removal label at layer 1 is not finite. In float32"):
        compute_saliency(model, [good, bad], (1, 3), cache_dir=tmp_path, progress=False)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_labels_of_one_dtype_are_not_taken_for_anothers(tiny_model, tmp_path):
    sample = {"id": "a", "prompt_ids": list(range(5, 40)), "response_ids": [7, 8]}
    found = [
        compute_saliency(tiny_model().to(dtype), [sample], (1, 3), cache_dir=tmp_path, progress=False)[0]["layer_3"]
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert found[0] != found[1]
