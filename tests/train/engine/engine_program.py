"""Runs under torchrun: our engine against plain torch on one process. Prints one JSON object of numbers on rank 0.

Reference: the same model, un-partitioned, on the whole global batch at once.
"""

import copy
import gc
import itertools
import json
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError
from common.files import read_json
from model.batch import Batch
from model.config import LoRAConfig
from model.decoder import loss
from model.generator.placement import decoder_layers
from tests.model import parts
from train.config import RunConfig, StageConfig, TrainedParts
from train.engine import checkpoint
from train.engine.checkpoint import Progress
from train.engine.engine import Engine, freeze
from train.engine.saving import Saver
from train.process import distributed

device = distributed.init(timeout_minutes=10)
from deepspeed.runtime.zero.partition_parameters import GatheredParameters  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad  # noqa: E402

RANK, WORLD = distributed.rank(), distributed.world_size()
torch.set_num_threads(1)
loss.CHUNK_LOGITS = 3 * parts.VOCABULARY  # ranks differ in the number of chunks of their loss


def configuration(stage: str, checkpointing: bool = False, micro: int | None = None, clip: float = 0.0) -> RunConfig:
    config = RunConfig(stage=StageConfig(name=stage, train=TrainedParts(llm=stage == "finetune")))
    config.engine.precision, config.engine.overlap_comm = "fp32", False
    config.engine.persistence_threshold = 0  # or nothing of a tiny model would be partitioned
    config.engine.gradient_checkpointing = checkpointing
    config.engine.micro_batch_size = micro
    config.data.batch_size = 4
    config.optim.grad_clip = clip
    config.optim.lr.connector = 1e-2
    return config


def global_batch(images: list[int], seed: int) -> Batch:
    """Four samples of one row each; those in `images` have an image."""
    batch = parts.batch(rows=[0, 1, 2, 3], images=images or [0], seed=seed, image_weight=None if images else [0.0])
    generator = torch.Generator().manual_seed(seed)
    for row in range(4):  # ranks have different numbers of targets
        cut = int(torch.randint(1, 5, (1,), generator=generator))
        batch.labels[row, :cut] = -100
    return batch


def part(batch: Batch, start: int, stop: int) -> Batch:
    """Samples start..stop, as the collator would have made them: a dummy where none has an image."""
    kept = (batch.image_to_sample >= start) & (batch.image_to_sample < stop) & (batch.image_weight > 0)
    has = bool(kept.any())
    return Batch(
        input_ids=batch.input_ids[start:stop],
        attention_mask=batch.attention_mask[start:stop],
        labels=batch.labels[start:stop],
        row_to_sample=batch.row_to_sample[start:stop] - start,
        images=batch.images[kept] if has else torch.zeros(1, 3, 28, 28),
        image_to_sample=batch.image_to_sample[kept] - start if has else torch.zeros(1, dtype=torch.int64),
        image_weight=torch.ones(int(kept.sum())) if has else torch.zeros(1),
        n_samples=stop - start,
    )


def step(engine: Engine, batch: Batch, micro_steps: int = 1, then=lambda: None, said: bool = False):
    """One optimizer step on this rank's share of a global batch; `then` runs before the weights change."""
    share = 4 // WORLD // micro_steps
    for micro in range(micro_steps):
        if said:
            engine.begin_micro_step(last=micro == micro_steps - 1)
        start = (RANK * micro_steps + micro) * share
        output = engine.forward(part(batch, start, start + share))
        engine.backward(output.loss_sum, batch.n_targets)
        if micro == micro_steps - 1:
            then()
        engine.micro_step()
    return engine.result()


def end(engine: Engine) -> None:
    """Take an engine down. What it leaves goes where DeepSpeed's collections, half of all seconds, do not look."""
    engine.deepspeed.destroy()
    gc.freeze()


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    return {n: safe_get_full_grad(p) for n, p in engine.model.named_parameters() if p.requires_grad}


def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], floor: float = 1e-4) -> float:
    """Largest difference of any tensor, relative to its own largest entry or `floor` times the largest of all."""
    scale = max(t.abs().max().item() for t in theirs.values())
    return max(
        (ours[n] - t).abs().max().item() / max(t.abs().max().item(), floor * scale, 1e-30) for n, t in theirs.items()
    )


def gradient_equality(results: dict) -> None:
    cases = {
        "mixed": [0, 0, 3],
        "first_rank_text_only": [2, 3],
        "all_images": [0, 1, 2, 3],
        "all_text": [],
    }
    for stage in ("pretrain", "finetune"):
        for checkpointing in (False, True):
            for name, images in cases.items():
                if WORLD == 1 and name == "first_rank_text_only":
                    continue
                image_norm = name == "all_images"
                reference = parts.build(parts.config(image_norm=image_norm))
                model = copy.deepcopy(reference)
                config = configuration(stage, checkpointing)
                freeze(reference, config.stage)
                freeze(model, config.stage)
                reference.train()
                batch = global_batch(images, seed=len(images))
                (reference(batch).loss_sum / batch.n_targets).backward()
                theirs = {n: p.grad for n, p in reference.named_parameters() if p.requires_grad}
                engine = Engine(model, config, total_steps=10, accumulation=1)
                found: dict[str, torch.Tensor] = {}
                step(engine, batch, then=lambda e=engine, f=found: f.update(gradients(e)))
                # Image norm makes some gradients exactly zero (a bias in front of it); fp32 leaves rounding there.
                difference = worst(found, theirs, floor=1.0 if image_norm else 1e-4)
                results[f"{stage}/{'checkpointing' if checkpointing else 'plain'}/{name}"] = difference
                end(engine)


TRAJECTORIES = {
    "partitioned": ("finetune", {}),
    # The demo's settings: parameters kept whole, all-reduce in small buckets, the step in sub-groups.
    "kept_whole": ("finetune", DEMO := {"persistence_threshold": 10**6, "reduce_scatter": False,
                                        "reduce_bucket_size": 3000, "sub_group_size": 2000}),
    "frozen_kept_whole": ("pretrain", DEMO),
    "packed": ("finetune", {"pack_tokens": 10}),
    # Micro-steps counted out by tokens: another number of them in every step.
    "by_tokens": ("finetune", {}),
    "reduced_in_bf16": ("finetune", {**DEMO, "reduce_dtype": "bf16"}),
    "compiled": ("finetune", {"zero_stage": 2, "compile": "aot_eager"}),
    "lora": ("finetune", {"pack_tokens": 10, "gradient_checkpointing": True}),
    "lora_kept_whole": ("finetune", DEMO),
    "lora_compiled": ("finetune", {"zero_stage": 2, "compile": "aot_eager"}),
}  # fmt: skip
OFFLOADED = {"offloaded": ("finetune", {}), "lora_offloaded": ("finetune", DEMO)}


def trajectories(results: dict, cases: dict = TRAJECTORIES) -> None:
    """Three AdamW steps, image - text only - image, with clipping and accumulation, against plain torch."""
    for name, (stage, settings) in cases.items():
        micro_steps = 4 // WORLD // 2 if WORLD == 1 else 2
        reference = parts.build(parts.config())
        model, config = copy.deepcopy(reference), configuration(stage, clip=0.5)
        config.optim.schedule, config.optim.warmup_ratio = "constant", 0.0
        if name in OFFLOADED:
            offload(config)
        for key, value in settings.items():
            setattr(model if key == "pack_tokens" else config.engine, key, value)
        if name.startswith("lora"):
            config.stage.train.llm, config.stage.lora = "lora", LoRAConfig(rank=4)
        for m in (reference, model):
            torch.manual_seed(0)  # of the adapters
            freeze(m, config.stage)
        reference.train()
        trained = [p for p in reference.parameters() if p.requires_grad]
        # A large eps: Adam with the usual one turns rounding in tiny gradients into full steps.
        optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.0)
        config.optim.eps = 1e-3
        changing = name == "by_tokens"
        engine = Engine(model, config, total_steps=10, accumulation=1 if changing else micro_steps)
        norms = []
        text_only = [] if stage == "finetune" else [2]  # a frozen LLM has nothing to learn from text
        for seed, images in enumerate([[0, 1, 2, 3], text_only, [0, 1]]):
            batch = global_batch(images, seed)
            optimizer.zero_grad()
            (reference(batch).loss_sum / batch.n_targets).backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, 0.5).item()
            optimizer.step()
            steps = (2, 1, 4 // WORLD)[seed] if changing else micro_steps
            norms.append(abs(step(engine, batch, steps, said=changing).grad_norm / norm - 1))
        ours = {n: safe_get_full_fp32_param(p) for n, p in engine.model.named_parameters() if p.requires_grad}
        theirs = {n: p.detach() for n, p in reference.named_parameters() if p.requires_grad}
        results[f"trajectory/{name}/weights"] = max((ours[n] - t).abs().max().item() for n, t in theirs.items())
        results[f"trajectory/{name}/grad_norm"] = max(norms)
        end(engine)


def frozen_parts_stay(results: dict) -> None:
    reference = parts.build(parts.config())
    model, config = copy.deepcopy(reference), configuration("pretrain")
    freeze(model, config.stage)
    engine = Engine(model, config, total_steps=10, accumulation=1)
    for seed in range(2):
        step(engine, global_batch([0, 1, 2, 3], seed))
    same, moved = True, False
    originals = dict(reference.named_parameters())
    for name, parameter in engine.model.named_parameters():
        with GatheredParameters([parameter]):
            equal = torch.equal(parameter.detach(), originals[name].detach())
        if name.startswith("connector."):
            moved |= not equal
        else:
            same &= equal
    results["frozen_bit_identical"], results["connector_moved"] = same, moved
    end(engine)


def graph_start(results: dict, checkpointing: bool = False) -> None:
    """Pretraining: nothing below the first placed layer has a graph or is gathered for the backward pass."""
    model, config = parts.build(parts.config()), configuration("pretrain", checkpointing)
    freeze(model, config.stage)
    engine = Engine(model, config, total_steps=10, accumulation=1)
    names = {module: name for name, module in engine.model.named_modules()}
    graph: dict[str, bool] = {}
    for name, module in {"vision": model.vision, **dict(enumerate(decoder_layers(model.llm)))}.items():
        module.register_forward_hook(lambda _, __, out, name=name: graph.update({str(name): out.requires_grad}))
    batch = part(global_batch([0, 1, 2, 3], 0), 4 // WORLD * RANK, 4 // WORLD * (RANK + 1))
    fetched: set[str] = set()
    for _ in range(2):  # the first step records ZeRO's trace, the second prefetches along it
        coordinator = engine.deepspeed.optimizer.parameter_offload.get_param_coordinator()
        fetch, output = coordinator.fetch_sub_module, engine.forward(batch)

        def watched(module, forward, fetch=fetch):
            fetched.add(names.get(module, ""))
            fetch(module, forward)

        coordinator.fetch_sub_module = watched
        engine.backward(output.loss_sum, batch.n_targets * WORLD)
        coordinator.fetch_sub_module = fetch
        engine.micro_step()
    results[f"graph/{checkpointing}"], results[f"fetched/{checkpointing}"] = graph, sorted(fetched)
    end(engine)


def graph_start_with_checkpointing(results: dict) -> None:
    graph_start(results, checkpointing=True)


class _Sometimes(nn.Module):
    """Parts named like ours; the connector takes part only when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = None
        self.connector, self.llm = nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False)

    def forward(self, given):
        x, used = given
        return self.llm(self.connector(x) if used else x).sum()


def stale_gradients(results: dict, offloaded: bool = False) -> None:
    """A parameter that takes no part in a step must not get an earlier step's gradient again."""
    torch.manual_seed(0)
    reference = _Sometimes()
    model, config = copy.deepcopy(reference), configuration("finetune")
    config.optim.schedule, config.optim.warmup_ratio, config.optim.betas = "constant", 0.0, [0.0, 0.999]
    if offloaded:
        offload(config)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.0, 0.999), weight_decay=0.0)
    engine = Engine(model, config, total_steps=10, accumulation=1)
    for seed, used in enumerate([True, False, True, False]):
        x = torch.randn(WORLD, 8, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad(set_to_none=False)
        (reference((x, used)) / WORLD).backward()
        if reference.connector.weight.grad is None:
            reference.connector.weight.grad = torch.zeros_like(reference.connector.weight)
        optimizer.step()
        engine.backward(engine.forward((x[RANK : RANK + 1], used)), WORLD)
        engine.micro_step()
        engine.result()
    ours = safe_get_full_fp32_param(engine.model.connector.weight)
    results["stale"] = (ours - reference.connector.weight).abs().max().item()
    end(engine)


def nan_steps(results: dict, offloaded: bool = False) -> None:
    model, config = parts.build(parts.config()), configuration("pretrain")
    if offloaded:
        offload(config)
    config.engine.max_skipped_steps = 2
    freeze(model, config.stage)
    engine = Engine(model, config, total_steps=10, accumulation=1)
    name, parameter = next((n, p) for n, p in engine.model.named_parameters() if p.requires_grad)
    before = safe_get_full_fp32_param(parameter).clone()
    batch = global_batch([0, 1, 2, 3], 0)
    batch.images[3] = float("nan")  # on the last rank only
    results["nan_applied"] = step(engine, batch).applied
    results["nan_weights_untouched"] = torch.equal(before, safe_get_full_fp32_param(parameter))
    try:
        step(engine, batch)
        results["nan_error"] = ""
    except UserError as error:
        results["nan_error"] = str(error)
    end(engine)


ORDERS = [
    *[(encoder, "vlora", 3) for encoder in parts.ENCODERS],
    *[("dinov2", connector, 3) for connector in ("mlp", "qformer", "crossattn")],
    *[("siglip", "qformer", stage) for stage in (0, 1, 2, 3)],
]
"""Encoder, connector, ZeRO stage."""


def features_of(model, batch):
    """What the connector makes of the images, where that is one tensor."""
    if model.placement is not None:
        return model.encode(batch.images)
    made = model.condition(batch)
    return made.context.features if made.tokens is None else made.tokens


def evaluation_first(results: dict) -> None:
    """A model's first use may be any: answers, a validation loss, features, a step. All equal plain torch's."""
    for encoder, connector, stage in ORDERS:
        for first in ("answer", "loss", "features", "step") if encoder == "siglip" and stage == 3 else ("answer",):
            reference = parts.build(parts.config(connector), encoder=encoder).eval()
            model, config = copy.deepcopy(reference), configuration("pretrain")
            config.engine.zero_stage = stage
            freeze(model, config.stage)
            engine = Engine(model, config, total_steps=10, accumulation=1)
            batch = part(global_batch([0, 1, 2, 3], 0), 4 // WORLD * RANK, 4 // WORLD * (RANK + 1))
            uses = {
                "answer": lambda m, b=batch: m.generate(b, 3, 0, (2,)).float(),
                "loss": lambda m, b=batch: m(b).loss_sum,
                "features": lambda m, b=batch: features_of(m, b),
            }
            worst_of = 0.0
            for name in sorted(uses, key=lambda n, first=first: n != first):
                if first == "step":
                    continue
                engine.model.eval()
                with torch.no_grad():
                    ours, theirs = uses[name](engine.model), uses[name](reference)
                engine.model.train()
                worst_of = max(worst_of, (ours - theirs).abs().max().item() / theirs.abs().max().clamp_min(1).item())
            step(engine, global_batch([0, 1, 2, 3], 1))
            engine.model.eval()
            with torch.no_grad():
                after = engine.forward(batch).loss_sum  # as a validation after the last step
            results[f"order/{encoder}/{connector}/{stage}/{first}"] = worst_of if after.isfinite() else float("inf")
            end(engine)


CHECKPOINTS = [
    *itertools.product(["bf16"], (1, 2, 3), ["frozen"]),
    *itertools.product(["fp32"], range(4), ["frozen"]),
    ("bf16", 3, "lora"),
    ("fp32", 2, "lora"),
]
"""Precision, ZeRO stage, what else."""


def checkpoints_load(results: dict, cases: list = CHECKPOINTS) -> None:
    """What is saved is loaded weights-only, in every ZeRO stage and precision: the next steps are the same."""
    folder = Path(distributed.gather(tempfile.mkdtemp())[0])
    for precision, stage, how in cases:
        losses, run = [], folder / f"{precision}-{stage}-{how}"
        for first in (True, False):
            model, config = parts.build(parts.config()), configuration("pretrain")
            config.engine.precision, config.engine.zero_stage = precision, stage
            config.stage.train.llm = "lora" if how == "lora" else False
            if how == "offloaded":
                offload(config)
            for part_of_it in (model.vision, model.connector, model.llm):
                part_of_it.to(torch.bfloat16 if precision == "bf16" else torch.float32)
            freeze(model, config.stage)
            engine = Engine(model, config, total_steps=10, accumulation=1)
            if first:
                step(engine, global_batch([0, 1, 2, 3], 0))
                Saver(engine, run, {"llm": "x"}, keep=1, background=False).save(Progress(step=1))
            else:
                found = checkpoint.find(run)
                assert checkpoint.load(engine, found, {"llm": "x"}).step == 1
            batch = part(global_batch([0, 1, 2, 3], 1), 4 // WORLD * RANK, 4 // WORLD * (RANK + 1))
            step(engine, global_batch([0, 1, 2, 3], 1))
            with torch.no_grad():
                losses.append(engine.forward(batch).loss_sum.item())
            end(engine)
        results[f"checkpoint/{precision}/{stage}/{how}"] = abs(losses[0] - losses[1])
    distributed.barrier()
    shutil.rmtree(folder, ignore_errors=True)


def what_one_rank_sees_all_refuse(results: dict) -> None:
    """A file that names a command is the last rank's to look at; another identity is seen by one rank only."""
    folder = Path(distributed.gather(tempfile.mkdtemp())[0])
    model, config = parts.build(parts.config()), configuration("pretrain")
    freeze(model, config.stage)
    engine = Engine(model, config, total_steps=10, accumulation=1)
    Saver(engine, folder, {"llm": "x"}, keep=1, background=False).save(Progress(step=1))
    path = checkpoint.find(folder)
    said = []
    for identity in ({"llm": "x" if RANK < WORLD - 1 else "y"}, {"llm": "x"}):
        try:
            checkpoint.load(engine, path, identity)
            said.append("")
        except UserError as error:
            said.append(str(error))
        if RANK == 0:
            file = path / sorted(read_json(path / "COMPLETE", "")["files"])[WORLD - 1]
            torch.save({**torch.load(file, weights_only=False), "extra": os.system}, file)
        distributed.barrier()
    results["refusals"] = distributed.gather(said)
    end(engine)
    distributed.barrier()
    shutil.rmtree(folder, ignore_errors=True)


def checkpoints_in_the_background(results: dict) -> None:
    """Training goes on while a checkpoint is written, as it would have; what is written is the step it names.

    Rank 0's disk is held up until two more steps are done, then all ranks wait.
    """
    folder = Path(distributed.gather(tempfile.mkdtemp())[0])
    for precision, stage in [("bf16", 3), ("fp32", 0), ("fp32", 2), ("fp32", 3)]:
        name = f"background/{precision}/{stage}"
        weights, published, moved = [], [], []
        for background in (False, True):
            model, config = parts.build(parts.config()), configuration("finetune")
            config.engine.precision, config.engine.zero_stage = precision, stage
            for part_of_it in (model.vision, model.connector, model.llm):
                part_of_it.to(torch.bfloat16 if precision == "bf16" else torch.float32)
            freeze(model, config.stage)
            engine = Engine(model, config, total_steps=10, accumulation=1)
            step(engine, global_batch([0, 1, 2, 3], 0))
            before = masters(engine)
            run = folder / f"{precision}-{stage}-{background}"
            saver, held, progress = Saver(engine, run, {}, 1, background), threading.Event(), Progress(step=1)
            writer = engine.deepspeed.checkpoint_engine
            write = writer.save
            if background and RANK == 0:
                writer.save = lambda *args, write=write, held=held: (held.wait(60), write(*args))
            saver.save(progress)
            for seed in (1, 2):
                step(engine, global_batch([0, 1], seed))
                progress.step += 1
                saver.poll()
                published.append((run / "checkpoints" / "step-000001").exists())
            held.set()
            saver.finish()
            shards = sorted((run / "checkpoints" / "step-000001").glob("*.pt"))
            weights.append([torch.load(file, weights_only=False) for file in shards])
            weights[-1].append(masters(engine))
            moved.append(not same(before, masters(engine)))
            assert checkpoint.find(run).name == "step-000001"
            end(engine)
        results[name] = {"same": same(*weights), "published": published, "moved": moved}
    distributed.barrier()
    shutil.rmtree(folder, ignore_errors=True)


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    """Every trained parameter, whole."""
    found = {n: safe_get_full_fp32_param(p) for n, p in engine.model.named_parameters() if p.requires_grad}
    plain = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
    return {n: (plain[n] if p is None else p).detach().clone() for n, p in found.items()}


def same(a, b) -> bool:
    """Whether two trees of containers and tensors are equal; other objects are compared by what they hold."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return same(vars(a), vars(b)) if hasattr(a, "__dict__") and not isinstance(a, type) else a == b


def offload(config: RunConfig) -> None:
    config.engine.offload_optimizer, config.optim.name = True, "deepspeed_cpu_adam"


def offloaded(results: dict) -> None:
    trajectories(results, OFFLOADED)
    stale_gradients(results, offloaded=True)
    nan_steps(results, offloaded=True)
    checkpoints_load(results, [("bf16", 3, "offloaded"), ("fp32", 2, "offloaded")])


def main() -> None:
    gc.freeze()  # nor at what was imported
    results: dict = {"world": WORLD}
    cases = (
        gradient_equality, trajectories, frozen_parts_stay, graph_start, graph_start_with_checkpointing,
        stale_gradients, nan_steps, evaluation_first, checkpoints_load,
        what_one_rank_sees_all_refuse, checkpoints_in_the_background, offloaded,
    )  # fmt: skip
    named = [case.__name__ for case in cases if case is not offloaded]  # which compiles DeepSpeed's optimizer
    for case in cases:
        if case.__name__ not in (sys.argv[1:] or named):  # named on the command line: only those
            continue
        case(results)
    if RANK == 0:
        print("RESULTS " + json.dumps(results), flush=True)
    distributed.barrier()
    distributed.shutdown()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's destroyed engines leave hooks that complain at interpreter shutdown


main()
