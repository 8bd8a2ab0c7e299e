"""A checkpoint folder as the hub has it: tiny weights, a real processor, a trained tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MllamaConfig, MllamaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

IMAGE_SIZE = 28
MAX_TILES = 2
_CORPUS = ["What animal is it? It is a big rabbit.", "A butterfly in a green meadow."] * 20
_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
# As Llama-3.2-Vision's: the system message is dropped where there are images.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<|image|>' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def write_checkpoint(
    folder: Path,
    *,
    template: str | None = CHAT_TEMPLATE,
    num_heads: int = 4,
    positions: int = 512,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Weights, config, tokenizer and processor, in the files of Llama-3.2-Vision's repository.

    Args:
        folder: to write to.
        template: goes into ``chat_template.json``; None writes none.
        num_heads: of the text layers, the key heads half of them.
        positions: of the text model.
        dtype: of the weights.
    """
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "MllamaImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_image_tiles": MAX_TILES,
        "processor_class": "MllamaProcessor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    _model(tokenizer, num_heads, positions).to(dtype).save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )


def _model(tokenizer: Any, num_heads: int, positions: int) -> MllamaForConditionalGeneration:
    image_token = tokenizer.convert_tokens_to_ids("<|image|>")
    vision = MllamaVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        intermediate_size=32,
        image_size=IMAGE_SIZE,
        patch_size=14,
        max_num_tiles=MAX_TILES,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        intermediate_layers_indices=[0, 1],
        vision_output_dim=48,
    )
    text = MllamaTextConfig(
        vocab_size=image_token,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=num_heads,
        num_key_value_heads=max(num_heads // 2, 1),
        intermediate_size=64,
        cross_attention_layers=[1],
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1)
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "gate" in name:
            torch.nn.init.constant_(parameter, 0.5)
    return model
