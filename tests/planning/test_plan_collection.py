"""A plan tells what a collection takes: its figures are those of real runs."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, VOCABULARY, Case, llama
from hypothesis import given
from hypothesis import strategies as st
from measure import products
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import curvfast
from curvfast import ops
from curvfast.collection import placement
from curvfast.collection.accumulator import Accumulator
from curvfast.collection.hooks import SharedInput
from curvfast.errors import InputError, LayerNotFound
from curvfast.model.batch import Batch
from curvfast.model.identity import is_causal_lm
from curvfast.model.layers import linear_layers
from curvfast.planning import CollectionPlan, plan_collection
from curvfast.planning.cost import moment_flops, totals
from curvfast.planning.memory import USABLE
from curvfast.planning.meta_device import LiveBytes
from curvfast.planning.rehearsal import Scratch, shared_inputs
from curvfast.planning.units import parse_bytes, parse_count, parse_rate, show_bytes

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


def wide_llama(attention: str = "eager", **changes: Any) -> nn.Module:
    """Wide enough that its matrix products and tensors outweigh everything else."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "vocab_size": 1000,
    }
    return llama(
        **{**sizes, "num_attention_heads": 4, "attn_implementation": attention, **changes}
    ).eval()


def wide_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 128, "n_layer": 3, "n_head": 4, "vocab_size": 1000, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation="eager")).eval()


def wide_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        image_size=64, patch_size=8, num_labels=10, attn_implementation="eager",
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def tokens(batch: int = 8, length: int = 96, vocabulary: int = 1000) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, vocabulary, (batch, length))}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(16, 3, 64, 64)}


WIDE = [
    pytest.param(wide_llama, tokens, "mlp", id="llama-mlp"),
    pytest.param(wide_llama, tokens, "all", id="llama-all"),
    pytest.param(wide_llama, tokens, "*.2.mlp.*", id="llama-top"),
    pytest.param(lambda: wide_llama(num_key_value_heads=2), tokens, "all", id="llama-grouped"),
    pytest.param(lambda: wide_llama(vocab_size=6000), tokens, "mlp", id="llama-wide-vocabulary"),
    pytest.param(wide_gpt2, tokens, "attention", id="gpt2"),
    pytest.param(wide_vit, images, "mlp", id="vit"),
]


def most_bytes(run: Callable[[], Any]) -> int:
    """Most bytes of tensors alive at once that ``run`` made, by the allocator's own account."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        gc.disable()
        try:
            run()
        finally:
            gc.enable()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def assert_same_peak(model: nn.Module, batch: dict[str, Tensor], layers: str) -> CollectionPlan:
    plan = plan_collection(model, layers, example=batch, device="cpu")
    assert plan.memory.weights == weight_bytes(model)
    # From the second batch on every sum is there.
    made = most_bytes(lambda: curvfast.collect_from(model, [batch, batch], layers, progress=False))
    assert plan.memory.peak == pytest.approx(weight_bytes(model) + made, rel=0.1)
    return plan


def weight_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(("make", "batch", "layers"), WIDE)
def test_its_flops_are_those_of_a_batch(make: Any, batch: Any, layers: str) -> None:
    model, one = make(), batch()
    plan = plan_collection(model, layers, example=one, device="cpu")
    # Told, so that the first batch is not asked by a probe.
    told = {"progress": False, "skip_last": is_causal_lm(model)}
    found = products(lambda: curvfast.collect_from(model, [one], layers, **told))
    assert plan.upper_bound_because is None
    assert plan.cost.total - plan.cost.sampling == pytest.approx(found, rel=0.01)
    forward = products(lambda: model(**one).logits)
    assert plan.cost.forward == pytest.approx(forward, rel=0.01)


@pytest.mark.parametrize(("make", "batch", "layers"), WIDE)
def test_its_peak_is_that_of_a_run(make: Any, batch: Any, layers: str) -> None:
    assert_same_peak(make(), batch(), layers)


@pytest.mark.parametrize(("make", "batch"), [(wide_llama, tokens), (wide_vit, images)])
def test_its_peak_is_that_of_a_run_in_bfloat16(make: Any, batch: Any) -> None:
    one = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch().items()}
    assert_same_peak(make().bfloat16(), one, "mlp")


def test_fused_attention_keeps_no_scores() -> None:
    one = tokens(4, 128)
    eager, fused = (
        assert_same_peak(wide_llama(attention, max_position_embeddings=128), one, "all")
        for attention in ("eager", "sdpa")
    )
    scores = 3 * 4 * 4 * 4 * 128 * 128
    more = eager.memory.activations - fused.memory.activations
    assert more == pytest.approx(scores, rel=0.02)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_its_sums_are_those_allocated(case: Case) -> None:
    model, batches = case.model(), case.batches()
    plan = plan_collection(model, case.layers, example=batches[0], device="cpu")
    with curvfast.collect(model, case.layers) as curvature:
        for batch in batches:
            model(**batch).loss.backward()
        sums = curvature._sums.parts[0]
        moments = {id(m): m for m in (*sums.inputs.values(), *sums.gradients.values())}
        assert plan.memory.sums == sum(m.sum.tiles.nbytes for m in moments.values())
    kept = {id(t): t.nbytes for f in curvature.factors().values() for t in (f.a_sum, f.g_sum)}
    assert plan.memory.factors == sum(kept.values())


def families() -> Iterator[Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    for kind, more in {
        "llama": {"num_key_value_heads": 1},
        "olmo2": {"num_key_value_heads": 2, "pad_token_id": 0},
        "qwen2": {"num_key_value_heads": 1},
        "phi": {"pad_token_id": 0},
        "gpt_neox": {},
    }.items():
        config = AutoConfig.for_model(kind, **small, vocab_size=VOCABULARY, **more)
        yield pytest.param(lambda c=config: AutoModelForCausalLM.from_config(c), id=kind)


def assert_same_sharing(model: nn.Module, batch: Any, layers: Any) -> CollectionPlan:
    plan = plan_collection(model, layers, example=batch, device="cpu")
    factors = curvfast.collect_from(model, [batch], layers, progress=False)
    owners: dict[int, str] = {}
    shared = {name: owners.setdefault(id(factors[name].a_sum), name) for name in factors}
    assert {layer.name: layer.owner for layer in plan.layers} == shared
    rows = {name: factors[name].rows_a for name in factors}
    assert {layer.name: layer.rows for layer in plan.layers} == rows
    return plan


@pytest.mark.parametrize("make", list(families()))
def test_layers_share_what_they_share_in_a_run(make: Callable[[], nn.Module]) -> None:
    assert_same_sharing(make().eval(), tokens(4, 12, VOCABULARY), "all")


def test_the_last_tensor_read_is_shared_too() -> None:
    plan = assert_same_sharing(
        llama().eval(), tokens(4, 12, VOCABULARY), ["*.gate_proj", "*.up_proj"]
    )
    assert sum(layer.shares for layer in plan.layers) == 3


class Recurrent(nn.Module):
    """One layer reads what its neighbour reads, and then reads on alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.top = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x) + self.two(x)
        return self.top(self.one(y.tanh()))


def test_a_layer_called_again_counts_again_and_shares_no_more() -> None:
    plan = assert_same_sharing(Recurrent(), torch.ones(5, 6), "*")
    assert [layer.rows for layer in plan.layers] == [10, 5, 5]
    assert [layer.owner for layer in plan.layers] == ["one", "two", "top"]


@given(st.lists(st.sets(st.sampled_from("abcd"), min_size=1), min_size=1, max_size=6))
def test_groups_part_as_the_accumulator_parts_its_sums(readings: list[set[str]]) -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abcd"})
    layers = linear_layers(model)
    sums = Accumulator(layers)
    x = torch.ones(1, 2)
    for readers in readings:
        rows = Batch(skip_last=False).call_rows(min(readers), x, None)
        sums.add_input(min(readers), rows, SharedInput(readers), x)
    expected: dict[int, str] = {}
    found = shared_inputs(readings, layers)
    for name in layers:
        if name in sums.inputs:
            assert found[name] == expected.setdefault(id(sums.inputs[name]), name)
        else:
            assert found[name] == name


@pytest.mark.parametrize("d", [64, 96, 100, 255, 576, 1024, 1500])
def test_a_second_moment_costs_what_it_is_said_to(d: int) -> None:
    out, x = ops.new_sum(d), torch.ones(16, d)
    assert moment_flops(d, 16, torch.device("cpu")) == products(lambda: ops.second_moment_(out, x))
    tiles = (-(-d // 128)) * (-(-d // 128) + 1) // 2
    assert moment_flops(d, 16, torch.device("cuda")) == 2 * 16 * tiles * 128**2


class NothingLarge(TorchDispatchMode):
    """Fails when a tensor of a megabyte is made anywhere but on the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_meta and result.nbytes >= 2**20:
            pytest.fail(f"a plan made a tensor of {result.nbytes} bytes by {func}")
        return result


def test_a_plan_allocates_no_weight_and_calls_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a plan called somebody"))
    with NothingLarge():
        for name in ("gpt2", "vit-base"):
            plan_collection(name, batch=1, seq_len=16)


@pytest.fixture(scope="module")
def olmo() -> CollectionPlan:
    with NothingLarge():
        return plan_collection("olmo-2-7b", device_memory="141GB", flops="100T")


def test_every_mlp_of_olmo_2_7b_fits_one_pass_of_141_gb(olmo: CollectionPlan) -> None:
    assert olmo.fits is True
    assert olmo.passes == 1
    assert olmo.layers_per_pass == len(olmo.layers) == 96
    assert olmo.memory.peak <= USABLE * 141e9
    assert olmo.verdict == f"fits in one pass: {olmo.memory.peak / 1e9:.1f} of 141 GB"
    assert olmo.verdict in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    # Gate and up share an A: 2 factors of 4096 a block, 3 of 11008; 32 and 86 tiles a side.
    narrow, wide = 32 * 33 // 2, 86 * 87 // 2
    assert olmo.memory.sums == 32 * (2 * narrow + 3 * wide) * 4 * 128**2
    assert olmo.memory.factors == 32 * 4 * (2 * 4096**2 + 3 * 11008**2)
    assert 2 * 7.29e9 < olmo.memory.weights < 2 * 7.31e9
    assert olmo.memory.logits == 8 * 512 * 100352 * 2
    assert olmo.memory.read_out == olmo.memory.weights + olmo.memory.sums + olmo.memory.factors


def test_the_time_is_the_work_over_the_rate_given(olmo: CollectionPlan) -> None:
    assert olmo.batches == -(-1_000_000 // (8 * 511))
    assert olmo.seconds == pytest.approx(olmo.batches * olmo.cost.total / 100e12)
    assert plan_collection("gpt2").seconds is None


def test_equal_blocks_are_one_line_of_the_table(olmo: CollectionPlan) -> None:
    lines = str(olmo).splitlines()
    gate, up = (next(x.split() for x in lines if f"mlp.{n}_proj " in x) for n in ("gate", "up"))
    assert gate[:4] == ["model.layers.*.mlp.gate_proj", "32", "4096", "11008"]
    assert up[4:6] == ["=", "gate_proj"]
    assert lines[-1] == olmo.verdict
    whole = next(line.split() for line in lines if line.startswith("together"))
    assert whole[-2:] == show_bytes(olmo.memory.read_out).split()


def test_a_plan_is_json(olmo: CollectionPlan) -> None:
    read = json.loads(json.dumps(olmo.to_dict()))
    assert read["memory"]["peak"] == olmo.memory.peak
    assert read["cost"]["overhead"] == olmo.cost.overhead
    assert len(read["layers"]) == 96
    assert read["verdict"] == olmo.verdict


def tight(memory: float, **options: Any) -> CollectionPlan:
    """A plan for a device with so many bytes, of short batches."""
    return plan_collection("gpt2", batch=1, seq_len=64, device_memory=int(memory), **options)


def test_what_does_not_fit_is_divided_into_the_fewest_passes_that_do() -> None:
    whole = tight(1e12)
    assert whole.fits
    for share in (0.9, 0.6, 0.35):
        memory = whole.memory.weights + share * (whole.memory.peak - whole.memory.weights)
        plan = tight(memory)
        assert plan.fits is False
        assert plan.memory.peak <= USABLE * memory
        assert plan.passes == -(-len(plan.layers) // plan.layers_per_pass) > 1
        assert f"layers_per_pass={plan.layers_per_pass} ({plan.passes} passes" in plan.verdict
        assert plan.cost.forward == plan.passes * whole.cost.forward
        assert plan.cost.backward < plan.passes * whole.cost.backward
        # As many devices as passes have room for everything at once; one less has not.
        assert tight(memory, world_size=plan.passes).fits is True
        assert tight(memory, world_size=plan.passes - 1).fits is False
        fewer = -(-len(plan.layers) // (plan.passes - 1))
        parts = [totals(plan.layers[i : i + fewer]) for i in range(0, len(plan.layers), fewer)]
        assert whole.memory.weights + max(p.sums + p.factors for p in parts) > USABLE * memory


def test_sums_elsewhere_are_offered_where_a_pass_fits_without_them() -> None:
    whole = tight(1e12).memory
    roomy = whole.during_pass - whole.sums + 100e6
    plan = tight(roomy)
    assert any(setting.startswith("sums_device='cpu'") for setting in plan.settings)
    assert any(setting.startswith("sums_device='disk'") for setting in plan.settings)
    for setting in plan.settings:
        assert setting in plan.verdict
    hopeless = tight(whole.weights)
    assert hopeless.settings == ()
    assert hopeless.passes == 1
    assert "smaller batches" in hopeless.verdict


def test_a_device_is_never_filled_to_the_brim() -> None:
    peak = tight(1e12).memory.peak
    assert tight(peak / USABLE + 2).fits is True
    brim = tight(peak / USABLE - 2)
    assert brim.fits is False
    assert "5% is left" in brim.verdict


def test_devices_to_spare_share_the_data() -> None:
    one, four = (plan_collection("gpt2", flops="1T", world_size=n) for n in (1, 4))
    assert four.seconds == pytest.approx(one.seconds / 4, rel=0.02)
    assert four.memory == one.memory


def test_a_model_is_left_as_it_was() -> None:
    model = llama(tie_word_embeddings=True).train()
    before = copy.deepcopy(model.state_dict())
    plan = plan_collection(model, device="cpu", batch=2, seq_len=8)
    assert plan.dtype == "float32"
    assert plan.memory.weights == weight_bytes(model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_second_moments_need_what_they_are_said_to_for_a_moment() -> None:
    x, rows = torch.ones(4000, 300), torch.arange(0, 4000, 2)
    made = most_bytes(lambda: ops.second_moment_(ops.new_sum(300), x, rows=rows))
    assert scratch_of(x[rows].to("meta"), "cpu") == made - ops.sum_bytes(300)
    # A GPU's kernels read rows where they lie, but narrow ones wait for company.
    assert scratch_of(torch.ones(8, placement.WIDEST + 1, dtype=torch.bfloat16), "cuda") == 0
    waiting, calls = torch.empty(8, 16, dtype=torch.bfloat16, device="meta"), placement.MOST_CALLS
    with LiveBytes([waiting]) as live:
        scratch = Scratch(torch.device("cuda"))
        for call in range(calls):
            scratch.add(waiting.clone())
            held = call + 1 if call + 1 < calls else 0
            assert live.now == held * waiting.nbytes


def scratch_of(x: Tensor, device: str) -> int:
    with LiveBytes([x]) as live:
        Scratch(torch.device(device)).add(x)
    assert live.now == 0
    return live.peak


class Branching(nn.Module):
    """Asks for a number in its data, which a tensor without values cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mlp = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.first(x) * int(x.shape[0] > x.sum().item()))


def test_what_cannot_be_rehearsed_is_bounded_from_above_and_says_so() -> None:
    plan = plan_collection(Branching(), ["first", "mlp"], example=torch.ones(3, 6), device="cpu")
    assert "item" in plan.upper_bound_because
    assert plan.labels == 3
    assert "upper bound" in str(plan)
    assert [layer.owner for layer in plan.layers] == ["first", "mlp"]
    assert plan.memory.sums == sum(ops.sum_bytes(d) for d in (6, 8, 8, 5))
    assert plan.cost.forward == 2 * 3 * (6 * 8 + 8 * 5)


def test_a_module_of_ones_own_needs_an_example() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    plan = plan_collection(model, "*", example=torch.ones(3, 6), device="cpu")
    assert plan.labels == 3
    assert plan.upper_bound_because is None
    with pytest.raises(InputError, match="with its head"):
        plan_collection(llama().model, batch=1, seq_len=8)
    with pytest.raises(InputError, match="example="):
        plan_collection(model, "*")


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    model.lock = threading.Lock()
    with pytest.raises(InputError, match="Sequential holds what cannot be copied"):
        plan_collection(model, "*", example=torch.ones(3, 6))


def test_a_config_on_disk_is_enough(tmp_path: Path) -> None:
    config = wide_llama("sdpa").config
    config.save_pretrained(tmp_path)
    plans = [
        plan_collection(source, batch=2, seq_len=16)
        for source in (tmp_path, str(tmp_path / "config.json"), config)
    ]
    assert len({plan.memory for plan in plans}) == 1
    assert plans[0].dtype == "bfloat16"
    made = type(wide_llama())._from_config(config, dtype=torch.bfloat16)
    assert plans[0].memory.weights == weight_bytes(made)


@pytest.mark.parametrize("name", ["gpt2", "llama-3-8b", "olmo-2-1b", "smollm2-135m", "vit-base"])
def test_built_in_shapes_are_rehearsed(name: str) -> None:
    millions = {
        "gpt2": 124,
        "llama-3-8b": 8030,
        "olmo-2-1b": 1485,
        "smollm2-135m": 135,
        "vit-base": 86.6,
    }
    plan = plan_collection(name, batch=1, seq_len=32)
    assert plan.upper_bound_because is None
    assert plan.memory.weights / 2e6 == pytest.approx(millions[name], rel=0.01)
    assert all(layer.rows == (197 if name == "vit-base" else 31) for layer in plan.layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "olmo2-7b"}, "built-in name: gpt2, llama-3-8b, olmo-2-1b, olmo-2-7b"),
        ({"device_memory": "141 apples"}, "'141GB'"),
        ({"tokens": "many"}, "'250k'"),
        ({"flops": "-4T"}, "'400T'"),
        ({"batch": 0}, "batch=0"),
        ({"dtype": "int8"}, "'bfloat16'"),
        ({"device": "tpu"}, "'cuda' or 'cpu'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_say_what_to_pass(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("'", ".")):
        plan_collection(**{"model": "gpt2", **arguments})


def test_a_damaged_config_and_missing_layers_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(InputError, match="no configuration transformers can read"):
        plan_collection(tmp_path)
    with pytest.raises(LayerNotFound, match=r"h\.0\.mlp\.c_fc"):
        plan_collection("gpt2", "*.experts.*")


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_bytes, "141GB", 141 * 10**9),
        (parse_bytes, "80GiB", 80 * 2**30),
        (parse_bytes, " 1.5 mib ", 3 * 2**19),
        (parse_bytes, 4096, 4096),
        (parse_count, "1M", 10**6),
        (parse_count, "1.5B", 1_500_000_000),
        (parse_count, "20_000", 20_000),
        (parse_rate, "400T", 4e14),
        (parse_rate, "989 TFLOP/s", 9.89e14),
        (parse_rate, "4e14", 4e14),
    ],
)
def test_sizes_are_read_as_people_write_them(parse: Any, text: Any, value: float) -> None:
    assert parse(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "-1GB", "1..5GB", "80GiBB", "1e400", "nan", "1 M B"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not"):
        parse_bytes(text)


@given(st.integers(1, 10**18))
def test_a_size_shown_is_read_back_to_three_digits(count: int) -> None:
    assert parse_bytes(show_bytes(count)) == pytest.approx(count, rel=5.1e-3)
