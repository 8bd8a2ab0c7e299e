"""A tiny, randomly initialised mllama with a tokenizer and a processor of its own, for trying out.

The tokenizer knows the 256 bytes and a few special tokens, so that it writes any language and needs
no file. Frames are one tile of 28 x 28 pixels. Nothing is downloaded.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import MllamaConfig, MllamaProcessor, PreTrainedTokenizerFast
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

IMAGE_TOKEN = "<|image|>"
IMAGE_SIZE = 28
MAX_POSITIONS = 4096
_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}"
    "<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes; the image token is the last id, past the model's output vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = (*_SPECIAL_TOKENS, IMAGE_TOKEN)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
    )


def tiny_processor() -> MllamaProcessor:
    """The processor that belongs to `tiny_config`, with a chat template like Llama's."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = MllamaImageProcessorPil(size=size, max_image_tiles=1)
    return MllamaProcessor(image_processor, tiny_tokenizer(), chat_template=_CHAT_TEMPLATE)


def tiny_config(vocab_size: int, *, num_heads: int = 4, num_kv_heads: int = 2) -> MllamaConfig:
    """A model of about 200,000 parameters: 4 text layers, 2 of them cross-attention, 2 of vision.

    Args:
        vocab_size: of the output; the image token's id is this number.
        num_heads, num_kv_heads: of the text layers.
    """
    vision = MllamaVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        intermediate_size=32,
        image_size=IMAGE_SIZE,
        patch_size=14,
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=[0, 1],
        vision_output_dim=48,
    )
    text = MllamaTextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=128,
        cross_attention_layers=[1, 3],
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=256,
        eos_token_id=260,
        pad_token_id=257,
    )
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=vocab_size)
