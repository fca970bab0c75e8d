"""The memory plan: its activations against those of a real pass, its states against ZeRO's formulas."""

import re

import pytest
import torch

from benchmarks import zoo
from data_prep.parts.tiny_llm import build_tokenizer
from data_prep.store.sample import Sample
from data_prep.store.writer import write_split
from model.batch import IGNORE
from model.decoder import loss
from model.vlm import build_model
from tests.model import parts
from train.config import RunConfig, StageConfig, TrainedParts
from train.data import DataConfig, SourceConfig
from train.engine.engine import freeze
from train.measure import memory
from train.measure.memory import MemoryPlan, Workload

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "model_type": "dinov2",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def configuration(stage: str = "pretrain", **engine) -> RunConfig:
    llm = {"pretrain": False, "finetune": True, "lora": "lora"}[stage]
    config = RunConfig(stage=StageConfig(name="finetune" if llm else stage, train=TrainedParts(llm=llm)))
    config.llm.path = config.vision.path = "-"
    config.llm.architecture, config.vision.architecture = ARCHITECTURE, VISION
    config.vision.layer = -1
    config.generator.width, config.generator.num_heads, config.generator.num_blocks = 32, 4, 1
    config.generator.rank, config.generator.every = 4, 2
    for key, value in ({"precision": "fp32"} | engine).items():
        setattr(config.engine, key, value)
    return config


LOAD = Workload(samples=6, images=6, rows=12, length=33, mean_length=33.0, measured=True)


@pytest.mark.parametrize(
    ("stage", "connector", "pack_tokens"),
    [
        ("pretrain", "vlora", None),
        ("finetune", "vlora", 99),
        ("pretrain", "mlp", 99),
        ("finetune", "qformer", None),
        ("lora", "vlora", None),
        ("lora", "mlp", 99),
        ("experts", "vlora", None),
    ],
)
def test_activations_are_those_of_a_real_pass(stage, connector, pack_tokens):
    """The same model with memory, real values, real kernels: bytes that autograd saves, each storage once."""
    config = configuration(stage.replace("experts", "finetune"))
    if stage == "experts":
        config.llm.architecture = ARCHITECTURE | {"model_type": "mixtral", "num_local_experts": 4}
    config.connector.name, config.connector.num_heads, config.llm.pack_tokens = connector, 4, pack_tokens
    found = memory.plan(config, 2, LOAD)

    meta = build_model(config.model, meta=True)
    freeze(meta, config.stage)
    model = meta.to_empty(device="cpu")
    torch.manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor.data, std=0.02)
    model.llm.get_decoder().rotary_emb.inv_freq.data.uniform_(0, 1)
    model.train()
    batch = parts.batch(rows=[i // 2 for i in range(12)], images=list(range(6)), length=33)
    batch.attention_mask[0, -1] = 0  # or transformers would do without a mask
    batch.labels[0, -1] = IGNORE
    seen = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept, total = [], 0

    def save(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(storage)
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        output = model(batch)
    output.loss_sum.backward()
    factors = sum(a.nbytes for a in output.weights.a.values()) if output.weights is not None else 0
    # The plan also holds what is only alive for a moment: the gradients of the factors, and logits or a layer's.
    rows = output.positions
    moment = max(min(12 * 33 * 512, loss.CHUNK_LOGITS) * 8, 3 * rows * 160 * 4)
    assert (found.activations - factors - moment) / total == pytest.approx(1, abs=0.03)
    assert found.checkpointed < found.activations


@pytest.mark.parametrize(("mode", "views"), [("resize", 1), ("tiles", 5)])
def test_the_micro_batch_that_a_token_budget_has_room_for(tmp_path, mode, views):
    """Four words and an end, two of three dialogues drawn, two images of four visual tokens a view in each row."""
    talk = [[{"role": "user", "content": ""}, {"role": "assistant", "content": "a red square here"}]] * 3
    write_split(tmp_path / "set", [Sample(f"{n}", [b"1", b"2"], talk, "made") for n in range(50)])
    config = configuration()
    config.data = DataConfig(str(tmp_path), [SourceConfig("set")], template="bare", dialogues_per_sample=2)
    config.vision.image_mode = mode
    tokenizer = build_tokenizer(["a red square here"])
    length = memory.workload(config, tokenizer, 25).length
    for name, visual in (("vlora", 0), ("mlp", 4), ("qformer", 3)):
        config.connector.name, config.connector.num_heads, config.connector.num_queries = name, 4, 3
        assert memory.image_tokens(config) == views * visual
        assert build_model(config.model, meta=True).connector.visual_tokens == visual
        config.data.tokens_per_micro_batch = 10 * 2 * (length + 2 * views * visual) - 1
        found = memory.workload(config, tokenizer, 25)
        assert (found.samples, found.images, found.rows, found.length) == (10, 20 * views, 20, length)
        config.data.tokens_per_micro_batch = None
        assert memory.workload(config, tokenizer, 25).samples == 25


def test_a_forward_that_depends_on_values_is_not_planned():
    config = configuration()
    config.llm.architecture = zoo.tiny_config("falcon_h1").to_dict()
    config.generator.types = "q,k,v,o"
    with pytest.raises(memory.UnknownMemory, match="FalconH1.* set engine.gradient_checkpointing to true or false"):
        memory.plan(config, 2, LOAD)


def test_only_layers_with_a_graph_count():
    """Placed at the last layer only, a frozen LLM keeps one layer; a trained one keeps four."""
    plans = []
    for layers in ([3], [1, 3]):
        config = configuration()
        config.generator.every, config.generator.layers = None, layers
        plans.append(memory.plan(config, 1, LOAD))
    assert plans[0].activations < 0.6 * plans[1].activations


@pytest.mark.parametrize("stage", ["finetune", "lora"])
def test_states_follow_zero(stage):
    """ZeRO (arXiv 1910.02054, figure 1): 2 + 2 + 12 bytes per parameter in bf16, here with fp32 gradients."""
    config = configuration(stage, precision="bf16", persistence_threshold=0)
    model = build_model(config.model, meta=True)
    freeze(model, config.stage)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if stage == "lora":  # rank 16 on q, o, k, v, gate, up, down of four layers of width 64, 32 for k and v, 160 inside
        adapters = 4 * 16 * (2 * 128 + 2 * 96 + 3 * 224)
        assert trained == adapters + sum(p.numel() for p in model.connector.parameters())
    for stage in range(4):
        for world in (1, 8):
            config.engine.zero_stage = stage
            found = memory.states(model, config, world)
            assert found.weights == pytest.approx(2 * total / (world if stage == 3 else 1), abs=2)
            assert found.gradients == pytest.approx(4 * trained / (world if stage >= 2 else 1), abs=2)
            assert found.optimizer == pytest.approx(12 * trained / (world if stage >= 1 else 1), abs=2)


def test_auto_recomputes_only_where_memory_asks_for_it():
    plan = MemoryPlan(100, 50, 150, buffers=50, update=0, activations=550, checkpointed=200)
    assert plan.total(False) == 900 and plan.total(True) == 550
    assert not plan.needs_checkpointing(1000) and plan.needs_checkpointing(999)
    later = MemoryPlan(100, 50, 150, buffers=50, update=700, activations=550, checkpointed=200)
    assert later.total(False) == 1000


def test_memory_of_a_rank():
    config = configuration(memory_gib=2.0)
    assert memory.available(config) == 2 * 2**30
    config = configuration()
    assert memory.available(config) is None
    cpu = torch.device("cpu")
    assert memory.available(config, cpu, 2) == memory.available(config, cpu, 1) // 2 > 0


@pytest.mark.parametrize(("gib", "verdict"), [
    (0.9, "fits with gradient_checkpointing=false, which `auto` takes"), (0.6, "fits with gradient_checkpointing=true"),
    (0.3, "DOES NOT FIT"), (None, "fits? set engine.memory_gib"),
])  # fmt: skip
def test_a_plan_says_whether_it_fits_and_whose_memory_that_is(gib, verdict):
    config = configuration(memory_gib=gib)
    plan = MemoryPlan(*(round(part * 2**20) for part in (100, 50, 150)), buffers=0, update=0,
                      activations=500 * 2**20, checkpointed=200 * 2**20)  # fmt: skip
    text = memory.describe(config, 2, LOAD, plan, memory.available(config))
    assert verdict in text.splitlines()[-1] and ("engine.memory_gib" in text.splitlines()[-1])
    assert re.search(r"all activations.*=false\) +0\.78", text) and re.search(r"recomputed.*=true\) +0\.49", text)
