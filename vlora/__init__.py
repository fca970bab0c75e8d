"""A trained model as a Hugging Face model: what a user imports.

Importing this package registers model type `vlora` with the Auto classes of transformers, so that `AutoConfig`,
`AutoProcessor`, `AutoModelForImageTextToText` and `pipeline("image-text-to-text")` read the folders that a run exports.
Nothing distributed is started, and no code that lies in a folder is run.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

# Not from the package: there, transformers 5.17 hides it where torchvision is not installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from model.generator.weights import PerceptualWeights
from vlora.configuration import VLoRAConfig
from vlora.conversation import Conversation
from vlora.folder import load
from vlora.modeling import VLoRAForConditionalGeneration
from vlora.processing import VLoRAImageProcessor, VLoRAProcessor

__all__ = [
    "Conversation",
    "PerceptualWeights",
    "VLoRAConfig",
    "VLoRAForConditionalGeneration",
    "VLoRAImageProcessor",
    "VLoRAProcessor",
    "load",
]

AutoConfig.register("vlora", VLoRAConfig)
AutoModelForImageTextToText.register(VLoRAConfig, VLoRAForConditionalGeneration)
AutoImageProcessor.register(VLoRAConfig, image_processor_classes={"pil": VLoRAImageProcessor})
AutoProcessor.register(VLoRAConfig, VLoRAProcessor)
# `pipeline` looks for the name of the class in this list and knows no registration.
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("vlora", VLoRAForConditionalGeneration.__name__)
