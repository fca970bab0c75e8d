"""What lmms-eval's entry point `lmms_eval.models` names: a run in its own processes, and controls of it and a server.

    lmms_eval --model vlora --model_args run=outputs/RUN --tasks mme --batch_size 16

Runs in lmms-eval's environment.
"""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> list[ModelManifest]:
    """`vlora` and `openai` with a question's own image (lmms-eval has that `openai`), a wrong one and none."""
    inside = f"{__package__}.in_process"
    return [
        ModelManifest("vlora", chat_class_path=f"{inside}.VLoRA", simple_class_path=f"{inside}.VLoRASimple"),
        ModelManifest("vlora_shuffled", chat_class_path=f"{inside}.VLoRAShuffled"),
        ModelManifest("vlora_none", chat_class_path=f"{inside}.VLoRANoImage"),
        ModelManifest("openai_shuffled", chat_class_path=f"{__package__}.controls.ServerShuffled"),
        ModelManifest("openai_none", chat_class_path=f"{__package__}.controls.ServerNoImage"),
    ]
