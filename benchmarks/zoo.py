"""`python -m benchmarks.zoo [FAMILY ...]`: which decoders and encoders work, tried one by one.

    make zoo                                  # all of them: about five core-minutes, rewrites docs/models.md
    python -m benchmarks.zoo granite qwen3    # some, printed only

Every decoder family of the installed transformers is built tiny and random, gets perceptual weights wherever it has a
projection of that kind, and is held against references of its own: the family's plain forward with dW added to its
weights, transformers' loss, single rows, padded rows, its own checkpointing, one prompt at a time, and what
`from_pretrained` reads back. What is refused is refused by the message that a user would get.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from common.errors import UserError
from common.files import write_atomically
from common.markdown import as_table
from model.batch import Batch
from model.config import ConnectorConfig, GeneratorConfig, ModelConfig, VisionConfig
from model.connectors import VLoRAConnector
from model.generator.placement import place
from model.generator.weights import PerceptualWeights
from model.vision import VisionEncoder
from model.vlm import VisionLanguageModel

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, WIDTH, LAYERS = 96, 32, 4
TYPES = ("q", "k", "v", "o", "gate", "up", "down", "m")
RESULTS = ROOT / "benchmarks" / "zoo.json"
"""What was found, family by family: a run of some families keeps the rest."""
_SECONDS = 60
"""Core-seconds for one family."""
CHECKS = ("deltas", "loss", "packed", "checkpointing", "generation", "export")

_TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 5,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "embedding_size": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "ffn_dim": 48,
    "d_model": WIDTH,
    "num_layers": LAYERS,
    "attention_heads": 4,
    "attn_implementation": "eager",
    "dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "residual_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "layerdrop": 0.0,
}
"""Sizes by the names that configurations have for them; each takes those it knows."""
_OWN: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "granitemoe": {"logits_scaling": 6.0},
    "gemma2": {"final_logit_softcapping": 3.0},
    "vaultgemma": {"final_logit_softcapping": 3.0},
    "phi3": {"pad_token_id": 0},
    "deepseek_v2": {"head_dim": 4, "num_key_value_heads": 4},
    "deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "qwen3_next": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 5},
    "minicpm3": {"head_dim": 4, "num_key_value_heads": 4},
    "glm": {"partial_rotary_factor": 0.5},
}  # fmt: skip
DECODERS = [
    "afmoe", "apertus", "arcee", "biogpt", "bitnet", "bloom", "cohere", "cohere2", "deepseek_v2",
    "deepseek_v3", "doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "falcon_h1", "flex_olmo",
    "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2",
    "gpt_neox", "gpt_oss", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "internlm3", "jais2", "jetmoe", "lfm2", "llama", "llama4_text", "mamba", "minicpm3",
    "minimax_m2", "ministral", "mistral", "mixtral", "mpt", "nanochat", "nemotron", "olmo", "olmo2", "olmo3",
    "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next",
    "recurrent_gemma", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma", "xglm", "youtu",
]  # fmt: skip
"""Model types of transformers."""
ENCODERS = [
    "clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit",
    "vit", "deit", "beit", "data2vec-vision", "ijepa", "vit_msn",
    "chinese_clip_vision_model",  "pixtral", "aimv2_vision_model",  "convnextv2",
]  # fmt: skip
_TINY_ENCODER: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "num_register_tokens": 2, "head_dim": 12,
}  # fmt: skip


@dataclass
class Entry:
    """What was found of one family.

    Attributes:
        types: Projections that take deltas.
        checks: By check, "ok" or what a user is told.
        refused: Why the family is refused altogether.
        fault: What broke without a message for users.
    """

    name: str
    types: tuple[str, ...] = ()
    checks: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    fault: str = ""


def _has(config: PreTrainedConfig, key: str) -> bool:
    try:
        return hasattr(config, key)
    except ValueError:  # Gemma 4 has one per layer
        return False


def tiny_config(name: str) -> PreTrainedConfig:
    """The family's configuration with tiny sizes."""
    known = AutoConfig.for_model(name)
    computed = {key for key in _TINY if isinstance(getattr(type(known), key, None), property)}
    taken = {key for key in _TINY if _has(known, key)} - computed | {"attn_implementation"}
    sizes = {key: value for key, value in _TINY.items() if key in taken}
    return AutoConfig.for_model(name, **sizes | _OWN.get(name, {}))


def decoder(name: str) -> nn.Module:
    """A random decoder of the family, in evaluation mode."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
    for parameter in llm.parameters():  # a norm of ones or a bias of zeros would hide what is forgotten
        parameter.data += 0.02 * torch.randn_like(parameter)
    llm.generation_config.do_sample = False
    llm.generation_config.eos_token_id = None
    return llm


def _placeable(name: str) -> tuple[tuple[str, ...], str]:
    """Types that the family has a projection for in the placed layers, and why the first other one is refused."""
    llm, types, why = decoder(name), [], ""
    for weight_type in TYPES:
        try:
            place(llm, GeneratorConfig(types=weight_type, every=2, rank=4))
            types.append(weight_type)
        except ValueError as error:
            why = why or " ".join(str(error).split())
    return tuple(types), why


def build(name: str, types: tuple[str, ...], pack_tokens: int | None = None) -> VisionLanguageModel:
    """The family's decoder behind a small encoder, with deltas that are not zero."""
    vision = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    sizes = GeneratorConfig(types=",".join(types), num_blocks=1, width=16, num_heads=2, rank=4, every=2)
    config = ModelConfig(vision=VisionConfig(path="-", layer=-1), generator=sizes, connector=ConnectorConfig())
    llm = decoder(name)
    encoder = VisionEncoder(AutoModel.from_config(vision).eval(), config.vision)
    connector = VLoRAConnector.build(config, llm, encoder.num_patches, encoder.feature_width)
    for factors in connector.generator.output_factors.values():
        nn.init.normal_(factors.weight, std=0.3)
    return VisionLanguageModel(encoder, connector, llm, pack_tokens).eval()


def batch(lengths: tuple[int, ...] = (9, 6, 8, 5), left: bool = False, seed: int = 0) -> Batch:
    """Rows of several lengths, an image each; the last row has none."""
    generator = torch.Generator().manual_seed(seed)
    rows, longest = len(lengths), max(lengths)
    ids = torch.randint(3, VOCABULARY, (rows, longest), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, longest - length if left else 0 : None if left else length] = 1
    ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100)
    images = torch.randn(rows - 1, 3, 28, 28, generator=generator)
    order = torch.arange(rows)
    return Batch(ids, mask, labels, order, images, order[:-1], torch.ones(rows - 1), rows)


def _weights(model: VisionLanguageModel, rows: Batch) -> PerceptualWeights:
    weights = model.condition(rows).weights
    assert weights is not None
    return weights


def _reference(name: str, model: VisionLanguageModel, rows: Batch, sample: int | None) -> nn.Module:
    """The family's plain model with the dW of one sample added to its weights, `m` beside its MLPs."""
    llm = decoder(name)
    if sample is None:
        return llm
    weights = _weights(model, rows)
    layers = llm.get_decoder().layers
    for site in weights.placement.sites:
        module = layers[site.layer].get_submodule(site.module)
        if site.type != "m":
            module.weight.data += weights.delta(site, sample)
            continue

        module.register_forward_hook(_beside(weights.delta(site, sample)), with_kwargs=True)
    return llm


def _beside(delta: Tensor) -> Callable[..., Any]:
    """A hook that adds x dW^T to what an MLP returns."""

    def add(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        return (out[0] + x @ delta.T, *out[1:]) if isinstance(out, tuple) else out + x @ delta.T

    return add


def _rows(rows: Batch) -> list[tuple[int | None, Tensor]]:
    """Sample (None: without an image) and ids of every row."""
    seen = set(rows.image_to_sample.tolist())
    return [
        (r if r in seen else None, rows.input_ids[r, rows.attention_mask[r] > 0][None]) for r in range(rows.n_samples)
    ]


def _near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)


def check_deltas(name: str, types: tuple[str, ...]) -> None:
    """Hidden states of a padded batch equal each row's own with dW in the weights; they differ from those without."""
    model, rows = build(name, types), batch()
    weights = _weights(model, rows)
    moved = 0.0
    with torch.no_grad():
        found = model.llm.get_decoder()(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            position_ids=(rows.attention_mask.cumsum(1) - 1).clamp_min(0),
            use_cache=False,
            perceptual_weights=weights.for_rows(rows.rows),
        ).last_hidden_state
        for row, (sample, ids) in enumerate(_rows(rows)):
            own = _reference(name, model, rows, sample).get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            _near(found[row, : ids.shape[1]], own[0])
            plain = decoder(name).get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            moved = max(moved, float((own - plain).abs().max()))
    assert moved > 1e-2, "deltas change nothing"


def check_loss(name: str, types: tuple[str, ...]) -> None:
    """The summed loss equals transformers' own, row by row."""
    model, rows = build(name, types), batch()
    expected = torch.zeros(())
    for sample, ids in _rows(rows):
        out = _reference(name, model, rows, sample)(input_ids=ids, labels=ids, use_cache=False)
        expected = expected + out.loss.detach() * (ids.shape[1] - 1)
    _near(model(rows).loss_sum.detach(), expected)


def check_packed(name: str, types: tuple[str, ...]) -> None:
    """Loss and gradients of packed rows equal those of padded ones."""
    padded, packed = build(name, types), build(name, types, pack_tokens=20)
    _same_training(padded, packed)


def check_checkpointing(name: str, types: tuple[str, ...]) -> None:
    """Recomputed layers give the same gradients."""
    plain, recomputed = build(name, types), build(name, types)
    recomputed.checkpoint_layers()
    _same_training(plain.train(), recomputed.train())


def _same_training(first: VisionLanguageModel, second: VisionLanguageModel) -> None:
    losses = []
    for model in (first, second):
        loss = model(batch()).loss_sum
        loss.backward()
        losses.append(loss.detach())
    _near(losses[1], losses[0])
    for mine, other in zip(second.connector.parameters(), first.connector.parameters(), strict=True):
        if other.grad is not None:
            _near(mine.grad / losses[0], other.grad / losses[0])


def check_generation(name: str, types: tuple[str, ...]) -> None:
    """Greedy answers to left-padded prompts equal those to each prompt alone."""
    model, rows = build(name, types), batch(left=True)
    together = model.generate(rows, 5, pad_token_id=0, answer_end=[VOCABULARY - 1])
    for row, (sample, ids) in enumerate(_rows(rows)):
        image = torch.zeros(1, 3, 28, 28) if sample is None else rows.images[sample : sample + 1]
        weight = torch.zeros(1) if sample is None else torch.ones(1)
        nothing, one = torch.full_like(ids, -100), torch.zeros(1, dtype=torch.int64)
        alone = Batch(ids, torch.ones_like(ids), nothing, one, image, one, weight, 1)
        out = model.generate(alone, 5, pad_token_id=0, answer_end=[VOCABULARY - 1])[0]
        assert together[row, : len(out)].tolist() == out.tolist(), "padding changes what is generated"


def check_export(name: str, types: tuple[str, ...]) -> None:
    """What `save_pretrained` writes of the model with deltas is the family's own, readable without us."""
    model, ids = build(name, types), batch((7,) * 4).input_ids
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.llm.save_pretrained(folder, state_dict=dict(model.llm.state_dict()))
        back = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        _near(back(input_ids=ids).logits, decoder(name)(input_ids=ids).logits)


_CHECKS: dict[str, Callable[[str, tuple[str, ...]], None]] = {
    "deltas": check_deltas,
    "loss": check_loss,
    "packed": check_packed,
    "checkpointing": check_checkpointing,
    "generation": check_generation,
    "export": check_export,
}


def examine(name: str) -> Entry:
    """Everything about one family."""
    entry = Entry(name)
    try:
        entry.types, why = _placeable(name)
        if not entry.types:
            entry.refused = why
            return entry
    except Exception as error:  # a family without decoder layers, or one that this cannot build in tiny
        entry.refused, entry.fault = (_line(error), "") if _for_users(error) else ("", _line(error))
        return entry
    for check, run in _CHECKS.items():
        try:
            run(name, entry.types)
            entry.checks[check] = "ok"
        except Exception as error:
            kind = "refused: " if _for_users(error) else f"FAULT: {type(error).__name__}: "
            entry.checks[check] = kind + _line(error)
    return entry


def _for_users(error: Exception) -> bool:
    """Whether the project itself refuses, in words, rather than something breaking inside a library."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError | UserError) and Path(frames[-1].filename).is_relative_to(ROOT / "model")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def check_encoder(name: str) -> str:
    """Why an encoder is refused, or nothing: each patch is at its place, and a layer is the encoder's own."""
    torch.manual_seed(0)
    known = AutoConfig.for_model(name)
    sizes = {key: value for key, value in _TINY_ENCODER.items() if hasattr(known, key)}
    try:
        encoder = AutoModel.from_config(AutoConfig.for_model(name, **sizes)).eval()
        for parameter in encoder.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        VisionEncoder(copy.deepcopy(encoder).to("meta"), VisionConfig(path=name, layer=-2))  # as the front end does
        features = {layer: VisionEncoder(encoder, VisionConfig(path=name, layer=layer)) for layer in (-3, -2)}
        patches = features[-2].num_patches
        pixels = torch.randn(2, 3, 28, 28)
        with torch.no_grad():
            own = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
            _near(features[-2](pixels), own[:, own.shape[1] - patches :])
            for patch in range(patches):  # before the first block, pixels of a patch reach its own feature only
                changed = pixels.clone()
                row, column = divmod(patch, 2)
                changed[:, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14] += 1
                moved = (features[-3](changed) - features[-3](pixels)).abs().amax((0, 2)) > 1e-5
                assert moved.nonzero().flatten().tolist() == [patch], "a patch is not at its place"
    except Exception as error:
        return ("refused: " if _for_users(error) else f"FAULT: {type(error).__name__}: ") + _line(error)
    return ""


def render(entries: dict[str, Entry], encoders: dict[str, str]) -> str:
    """docs/models.md."""
    entries = {name: entries[name] for name in DECODERS if name in entries}
    encoders = {name: encoders[name] for name in ENCODERS if name in encoders}
    works = [e for e in entries.values() if e.checks and all(found == "ok" for found in e.checks.values())]
    lines = [
        "# Models",
        "",
        f"Made by `make zoo` with transformers {transformers.__version__}; do not edit. Every family is built tiny and",
        "random and held against references of its own (`benchmarks/zoo.py` says how):",
        "",
        *(f"- **{name}**: {(run.__doc__ or '').splitlines()[0]}" for name, run in _CHECKS.items()),
        "",
        f"## Language models: {len(works)} of {len(entries)} pass everything",
        "",
        "`types` are the projections that take deltas (`generator.types`); connectors with visual tokens need none.",
        "",
    ]
    table, notes = [["family", "types", *CHECKS]], []
    for entry in entries.values():
        if not entry.checks:
            continue
        cells = []
        for check in CHECKS:
            found = entry.checks.get(check, "")
            cells.append("yes" if found == "ok" else "refused" if found.startswith("refused") else "no")
            if found != "ok":
                notes.append(f"- `{entry.name}`, {check}: {found.removeprefix('refused: ').removeprefix('FAULT: ')}")
        table.append([entry.name, " ".join(entry.types), *cells])
    refused = [entry for entry in entries.values() if not entry.checks]
    lines += [as_table(table), "", "What was refused or does not work, and why:", "", *(notes or ["- nothing"])]
    lines += ["", "No place for deltas, so `connector=vlora` refuses:", ""]
    lines += [f"- `{entry.name}`: {entry.refused}" for entry in refused if entry.refused]
    lines += [f"- `{entry.name}`: not tried, not built in tiny ({entry.fault})" for entry in refused if entry.fault]
    good = [name for name, why in encoders.items() if not why]
    lines += ["", f"## Vision encoders: {len(good)} of {len(encoders)}", ""]
    lines += [as_table([("encoder", "works"), *((name, why or "yes") for name, why in encoders.items())])]
    return "\n".join(lines) + "\n"


def _known(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    if not file.is_file():
        return {}, {}
    record = json.loads(file.read_text())
    entries = {name: Entry(**value | {"types": tuple(value["types"])}) for name, value in record["decoders"].items()}
    return entries, record["encoders"]


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"took more than {_SECONDS} core-seconds")


def main() -> int:
    """Examine families and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="default: all, encoders too")
    parser.add_argument("--write", action="store_true", help="put what was found into docs/models.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGVTALRM, _too_long)
    entries, encoders = _known(RESULTS)
    for name in arguments.families or [*DECODERS, *ENCODERS]:
        signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
        if name in ENCODERS:
            encoders[name] = check_encoder(name)
            print(f"{name}: {encoders[name] or 'ok'}", flush=True)
        else:
            entries[name] = examine(name)
            wrong = {check: found for check, found in entries[name].checks.items() if found != "ok"}
            words = (" ".join(entries[name].types), entries[name].refused, entries[name].fault)
            print(
                f"{name}: {' '.join(filter(None, words))}", *(f"\n    {c}: {f}" for c, f in wrong.items()), flush=True
            )
        if arguments.write:
            record = {"decoders": {n: asdict(e) for n, e in sorted(entries.items())}, "encoders": encoders}
            write_atomically(RESULTS, json.dumps(record, indent=1) + "\n")
    if arguments.write:
        write_atomically(ROOT / "docs" / "models.md", render(dict(sorted(entries.items())), encoders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
