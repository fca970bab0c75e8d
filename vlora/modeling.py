"""The trained model in the form of transformers: `from_pretrained`, `forward`, `generate`, `save_pretrained`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.batch import Batch
from model.connectors import Conditioning
from model.decoder.cross_attention import VisualContext
from model.deploy.merging import MergeReport, merged
from model.generator.weights import PerceptualWeights
from model.loading import ModelError, fingerprint
from model.vision import VisionEncoder
from model.vlm import VisionLanguageModel, assemble, build_model
from vlora import folder as folders
from vlora.configuration import VLoRAConfig

_HUB = ("revision", "token", "cache_dir", "local_files_only")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What transformers' own callers pass along and what is decided here anyway.
_IGNORED = {
    "trust_remote_code", "code_revision", "force_download", "proxies", "adapter_kwargs", "_from_auto", "_commit_hash",
    "low_cpu_mem_usage", "use_safetensors", "weights_only", "subfolder", "_from_pipeline",
}  # fmt: skip


class VLoRAForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Image and conversation in, answer out, whichever connector was trained.

    Shapes: R rows, L tokens, n images. Rows are padded on the left, as `VLoRAProcessor` pads them.

    Args:
        config: The configuration.
        model: The model it describes; none: one with random weights.
    """

    config_class = VLoRAConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values", "perceptual_weights", "visual_context"]

    def __init__(self, config: VLoRAConfig, model: VisionLanguageModel | None = None) -> None:
        if model is None:
            settings = config.model_config()
            llm = AutoModelForCausalLM.from_config(config.text_config)
            model = assemble(settings, llm, VisionEncoder(AutoModel.from_config(config.vision_config), settings.vision))
        assert model.vision is not None, "the vision encoder is part of a trained model"
        config.text_config, config.vision_config = model.llm.config, model.vision.encoder.config
        config._attn_implementation = model.llm.config._attn_implementation
        model.llm.config.use_cache = True  # off in training only
        super().__init__(config)
        self.model = model
        self._merged = False
        self._paths: dict[str, str] = {}
        self._card: bytes | None = None
        self._copies_parts = False  # in `push_to_hub`, which calls `save_pretrained` without options
        self._pushing = False
        self.post_init()

    def init_weights(self) -> None:
        """The parts come with their weights."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: VLoRAConfig | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        attn_implementation: str | None = None,
        llm: str | None = None,
        vision: str | None = None,
        **options: Any,
    ) -> VLoRAForConditionalGeneration:
        """A trained model, in evaluation mode; parts that it only refers to are frozen.

        Args:
            pretrained_model_name_or_path: A run directory, a folder or a Hugging Face name.
            config: As changed by the caller; none: the folder's.
            dtype: A torch dtype, its name, or `auto`: what it was trained in.
            device_map: One device for the whole model; `auto`: the GPU if there is one.
            attn_implementation: Of the language model; none: as in training.
            llm, vision: Where those parts are on this machine, if not where `config.json` says.
            options: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            ModelError: nothing there, or parts that are missing or others.
            TypeError: an option this model does not have.
        """
        dtype = options.pop("torch_dtype", None) or dtype
        if unknown := sorted(set(options) - set(_HUB) - _IGNORED - {"output_loading_info"}):
            raise TypeError(f"from_pretrained of {cls.__name__} does not know {', '.join(unknown)}")
        folder = folders.find(
            pretrained_model_name_or_path, **{k: v for k, v in options.items() if k in _HUB and v is not None}
        )
        config = config or folders.read_config(folder)
        parts = config.parts or {}
        paths = {p: folders.part_path(folder, config, p, g) for p, g in (("llm", llm), ("vision", vision))}
        settings = config.model_config(paths["llm"], paths["vision"])
        if attn_implementation is not None:
            settings.llm.attn_implementation = attn_implementation
        built = build_model(settings, _dtype(dtype, config))
        try:
            built.connector.load_state_dict(folders.read_connector(folder))
        except RuntimeError as error:
            raise ModelError(f"{folder}: the weights do not fit config.json ({error})") from error
        model = cls(config, built)
        for name, path in paths.items():
            if not Path(path).is_dir() and fingerprint(path) != parts[name]["fingerprint"]:
                raise ModelError(f"{path} is another {name} now than this model was trained with")
        model.generation_config = _read_generation_config(folder)
        model.name_or_path = str(pretrained_model_name_or_path)
        for name, part in (("llm", built.llm), ("vision", model.encoder)):
            part.requires_grad_(parts[name].get("base") is not None)
        model._paths = paths
        model._card = (folder / "README.md").read_bytes() if (folder / "README.md").is_file() else None
        model.to(_device(device_map)).eval()
        info: dict[str, list] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (model, info) if options.get("output_loading_info") else model  # type: ignore[return-value]

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        standalone: bool = False,
        max_shard_size: str = "4GB",
        **options: Any,
    ) -> None:
        """Write a folder that `from_pretrained` reads; its processor is saved by `processor.save_pretrained`.

        Args:
            save_directory: Made if missing.
            is_main_process: Only one of several processes writes.
            push_to_hub: Send it to the hub afterwards; `options` go to `push_to_hub`.
            standalone: Copy language model and vision encoder into the folder even where they are other people's
                models, so that the folder needs nothing else.
            max_shard_size: Of the parts' weight files.

        Raises:
            ValueError: a state dictionary, which this model does not take.
        """
        if options.pop("state_dict", None) is not None:
            raise ValueError("save_pretrained writes the model's own weights; state_dict= is not supported")
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", Path(save_directory).name), standalone=standalone, **options)
        if not is_main_process:
            return
        standalone = standalone or self._copies_parts
        folder = Path(save_directory)
        config = VLoRAConfig.from_dict(self.config.to_dict())
        parts = config.parts = dict(config.parts or {})
        config.dtype = str(self.dtype).removeprefix("torch.")
        for name, part in (("llm", self.model.llm), ("vision", self.encoder.encoder)):
            record = dict(parts.get(name) or {})
            trained = any(p.requires_grad for p in part.parameters()) or record.get("base") is not None
            if standalone or trained or not record:
                part.save_pretrained(folder / name, max_shard_size=max_shard_size)
                base = dict(record.get("base") or {k: record[k] for k in record if k != "base"}) or None
                found = fingerprint(str(folder / name))
                parts[name] = {"path": name, "fingerprint": found, "base": base if trained else None}
                if self._pushing and base and Path(base["path"]).expanduser().is_absolute():
                    base["path"] = Path(base["path"]).name  # where it is on this machine is nobody's business
            elif Path(self._paths[name]).is_dir():
                parts[name] = record | {"path": str(Path(self._paths[name]).resolve())}
        folders.write(folder, config, self.model.connector.state_dict(), None, self.generation_config)

    def push_to_hub(self, repo_id: str, *, standalone: bool | None = None, **options: Any) -> str:
        """Send the model to the hub, with the card of the folder that it was loaded from.

        Args:
            repo_id: Its name there.
            standalone: As in `save_pretrained`; none: where a part is a folder of this machine.
            options: As in transformers.
        """
        local = any(Path(path).is_dir() for path in self._paths.values())
        self._copies_parts, self._pushing = local if standalone is None else standalone, True
        try:
            return super().push_to_hub(repo_id, **options)
        finally:
            self._copies_parts = self._pushing = False

    def _upload_modified_files(self, working_dir: str, *args: Any, **options: Any) -> Any:
        if self._card is not None:  # in place of the empty one that transformers writes
            (Path(working_dir) / "README.md").write_bytes(self._card)
        return super()._upload_modified_files(working_dir, *args, **options)

    def perceive(self, pixel_values: Tensor, image_to_row: Tensor | None = None, rows: int = 1) -> PerceptualWeights:
        """Turn images into weights, once.

        Args:
            pixel_values: Float [n, 3, H, W].
            image_to_row: int64 [n], which set of weights each image goes to; none: all to one.
            rows: Sets of weights.

        Raises:
            ModelError: a connector that puts tokens into the input makes no weights.
        """
        if self.model.placement is None:
            raise ModelError(f"connector {self.config.connector['name']} makes no weights; only vlora does")
        conditioning = self._condition(pixel_values, image_to_row, rows)
        assert conditioning.weights is not None
        return conditioning.weights

    def look(
        self, pixel_values: Tensor, image_to_row: Tensor | None = None, rows: int = 1
    ) -> list[PerceptualWeights | VisualContext | None]:
        """Images, encoded once: for each row what `forward` and `generate` take in place of their pixels.

        Args:
            pixel_values, image_to_row, rows: As for `perceive`.

        Returns:
            Weights or contexts; contexts can be added up and batched as weights can. None for a connector whose
            visual tokens stand in the input: its images are encoded with the text.
        """
        if self.model.connector.visual_tokens:
            return [None] * rows
        made = self._condition(pixel_values, image_to_row, rows)
        if made.weights is not None:
            return [made.weights.select(torch.tensor([row], device=self.device)) for row in range(rows)]
        assert made.context is not None
        features = made.context.features
        owners = torch.zeros(len(features)).long() if image_to_row is None else image_to_row.cpu()
        return [VisualContext.of_row(features[(owners == row).to(features.device)]) for row in range(rows)]

    @contextmanager
    def merged(self, weights: PerceptualWeights, types: tuple[str, ...] | None = None) -> Iterator[MergeReport]:
        """Inside the block the language model itself holds one image's weights and decodes as a plain LLM.

        Every row is taken to be about that image. What cannot be merged (`m`) runs as a branch. After the block the
        weights are bit-identical to before.

        Args:
            weights: Of one sample.
            types: What to merge; none: whatever can be.

        Yields:
            What rounding to the weights' dtype loses, measured.
        """
        if weights.n_samples != 1:
            raise ValueError(f"one set of weights can be merged at a time, not {weights.n_samples}")
        with merged(self.model.llm, weights, 0, types) as report:
            self._merged = True
            try:
                yield report
            finally:
                self._merged = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_to_row: Tensor | None = None,
        image_at: Tensor | None = None,
        perceptual_weights: PerceptualWeights | None = None,
        visual_context: VisualContext | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [R, L', vocabulary], and with `labels` the mean loss; L' counts visual tokens of the connectors that
        put them into the input.

        Args:
            input_ids, attention_mask: int64 [R, L].
            position_ids: int64 [R, L]; none: counted by the mask.
            past_key_values: A cache of transformers.
            inputs_embeds: Float [R, L, D] in place of `input_ids`.
            pixel_values, image_to_row, image_at: As `VLoRAProcessor` returns them.
            perceptual_weights: What `perceive` made earlier, in place of `pixel_values`; row i uses sample i, and a
                single sample serves every row.
            visual_context: What `look` made earlier, for connector `crossattn`.
            labels: int64 [R, L], -100 where there is no target; not shifted.
            use_cache: Return a cache.

        Raises:
            ValueError: images and weights, or weights inside `merged`.
        """
        self._check(pixel_values, perceptual_weights)
        loss = None
        if labels is not None:
            output = self.model(self._batch(input_ids, attention_mask, pixel_values, (image_to_row, image_at), labels))
            loss = output.loss_sum / max(1, output.n_targets)
        if pixel_values is not None:
            perceptual_weights, inputs = self._inputs(input_ids, attention_mask, pixel_values, (image_to_row, image_at))
            input_ids, inputs_embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
            visual_context = inputs.get("visual_context")
            attention_mask, position_ids = inputs["attention_mask"], inputs["position_ids"]
        if perceptual_weights is not None:
            options["perceptual_weights"] = perceptual_weights
        if visual_context is not None:
            options["visual_context"] = visual_context
        out = self.model.llm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **options,
        )
        out.loss = loss
        return out

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_to_row: Tensor | None = None,
        image_at: Tensor | None = None,
        perceptual_weights: PerceptualWeights | None = None,
        **options: Any,
    ) -> Any:
        """Prompts and their continuations, int64 [R, L + new], as transformers' `generate` returns them.

        Images are encoded once, before the first token. See `forward` and `GenerationMixin.generate`.
        """
        self._check(pixel_values, perceptual_weights)
        ids = inputs if inputs is not None else options.pop("input_ids")
        mask = options.pop("attention_mask", None)
        mask = torch.ones_like(ids) if mask is None else mask
        if pixel_values is None:
            if perceptual_weights is not None:
                options["perceptual_weights"] = perceptual_weights
            return super().generate(ids, generation_config, attention_mask=mask, **options)
        weights, given = self._inputs(ids, mask, pixel_values, (image_to_row, image_at))
        if weights is not None:
            options["perceptual_weights"] = weights
        if "inputs_embeds" not in given:
            options |= {name: given[name] for name in ("visual_context",) if name in given}
            return super().generate(ids, generation_config, attention_mask=mask, **options)
        embeds = {key: given[key] for key in ("inputs_embeds", "attention_mask")}
        out = super().generate(None, generation_config, **embeds, **options)
        whole = not isinstance(out, Tensor)
        new = out.sequences if whole else out
        new = torch.cat([ids.repeat_interleave(len(new) // len(ids), 0), new], dim=1)
        if whole:
            out.sequences = new
        return out if whole else new

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **options: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        # Beams and several answers: a row becomes rows that stand together, and they keep its weights.
        weights = options.get("perceptual_weights")
        count = len(input_ids) if input_ids is not None else len(options["attention_mask"])
        ids, options = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **options)
        if weights is not None:
            options["perceptual_weights"] = weights.repeat_rows(count, expand_size)
        return ids, options

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder."""
        assert self.model.vision is not None
        return self.model.vision

    def get_input_embeddings(self) -> torch.nn.Module:
        """Of the language model."""
        return self.model.llm.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        """Of the language model."""
        return self.model.llm.get_output_embeddings()

    def get_decoder(self) -> torch.nn.Module:
        """Of the language model."""
        return self.model.llm.get_decoder()

    def _check(self, pixel_values: Tensor | None, weights: PerceptualWeights | None) -> None:
        if pixel_values is not None and weights is not None:
            raise ValueError("give pixel_values or perceptual_weights, not both; weights can be summed: a + b")
        if self._merged and (pixel_values is not None or weights is not None):
            raise ValueError("the model holds an image's weights merged; leave the block to show it another one")

    def _batch(
        self,
        ids: Tensor,
        mask: Tensor | None,
        pixel_values: Tensor | None,
        places: tuple[Tensor | None, Tensor | None],
        labels: Tensor | None = None,
    ) -> Batch:
        rows, (image_to_row, image_at) = len(ids), places
        if pixel_values is None:
            size = self.encoder.image_size
            pixel_values = torch.zeros(1, 3, size, size, device=ids.device)
            image_to_row, image_at, weight = torch.zeros(1, dtype=torch.int64), None, torch.zeros(1)
        else:
            weight = torch.ones(len(pixel_values))
            if image_to_row is None:
                if rows > 1 and len(pixel_values) != rows:
                    raise ValueError(f"{len(pixel_values)} images for {rows} rows: give image_to_row")
                image_to_row = torch.arange(len(pixel_values)) if rows > 1 else torch.zeros(len(pixel_values)).long()
        batch = Batch(
            input_ids=ids.cpu(),
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            labels=ids if labels is None else labels,
            row_to_sample=torch.arange(rows),
            images=pixel_values,
            image_to_sample=image_to_row.cpu(),
            image_weight=weight,
            n_samples=rows,
            image_at=None if image_at is None else _by_row(image_to_row, image_at, rows),
        )
        return batch.to(self.device, next(self.encoder.parameters()).dtype)

    def _condition(self, pixel_values: Tensor, image_to_row: Tensor | None, rows: int) -> Conditioning:
        owners = torch.zeros(len(pixel_values), dtype=torch.int64) if image_to_row is None else image_to_row
        ids = torch.zeros(rows, 1, dtype=torch.int64)
        with torch.no_grad():
            return self.model.condition(self._batch(ids, None, pixel_values, (owners, None)))

    def _inputs(
        self, ids: Tensor, mask: Tensor | None, pixel_values: Tensor, places: tuple[Tensor | None, Tensor | None]
    ) -> tuple[PerceptualWeights | None, dict[str, Any]]:
        batch = self._batch(ids, mask, pixel_values, places)
        conditioning = self.model.condition(batch)
        inputs = self.model.inputs(batch, conditioning).keywords
        return inputs.pop("perceptual_weights", None), inputs


def _by_row(image_to_row: Tensor, image_at: Tensor, rows: int) -> Tensor:
    """`Batch.image_at` of rows that are samples of their own: int64 [R, K], -1 where a row has fewer images."""
    found: list[list[int]] = [[] for _ in range(rows)]
    for row, place in zip(image_to_row.tolist(), image_at.tolist(), strict=True):
        found[row].append(place)
    most = max(1, *map(len, found))
    return torch.tensor([places + [-1] * (most - len(places)) for places in found], dtype=torch.int64)


def _dtype(dtype: str | torch.dtype, config: VLoRAConfig) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = str(config.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    if name not in _DTYPES:
        raise ModelError(f"dtype={name}: choose one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _device(device_map: Any) -> torch.device:
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, dict):
        raise ModelError("device_map: the model lives on one device; name it, for example device_map='cuda:0'")
    return torch.device("cpu" if device_map is None else device_map)


def _read_generation_config(folder: Path) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return folders.generation_config(folders.read_processor(folder))
