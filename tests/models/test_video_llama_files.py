"""Video-LLaMA from the files of its repository, and from the folder that these become."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

from ds_lvx.compare.case import (
    case_of,
    cut,
    make_batch,
    random_case,
)
from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import read_conversations
from ds_lvx.data.errors import DataError
from ds_lvx.data.text import TextEncoder
from ds_lvx.models.byte_tokenizer import byte_tokenizer
from ds_lvx.models.registry import FAMILIES
from ds_lvx.models.video_llama.convert import main
from ds_lvx.plan import models as planned
from ds_lvx.sharding import shard_batch
from ds_lvx.training.model import Source
from tests.data.media import chat, write_image, write_jsonl, write_video
from tests.launch.finetune_runs import write_config
from tests.models import video_llama_case
from tests.models.alone_case import patched_by
from tests.models.compare_case import compared, parts_of
from tests.models.files_case import first_loss, maker_of, whole_batches
from tests.models.video_llama_double import QFormer, VideoLLAMA

ROWS = 259  # bytes and three special tokens
IMAGE = ROWS
PLACES, SIDE = video_llama_case.PLACES, 28
WIDTH, TOWER = 128, 176  # two heads each, of the sizes that all have
FILES = {
    "language": "language",
    "vision": "eva.pth",
    "qformer": "blip2.pth",
    "checkpoint": "vl.pth",
    "output": "whole",
}
NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn.projection": "attn.proj",
    "self_attn": "attn",
}
"""transformers' names in BLIP-2's tower, and those of the file that it was made of."""


class Eva(nn.Module):
    """The tower without the norm behind it, by transformers."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"hidden_size": TOWER, "intermediate_size": 40, "patch_size": 14}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE}
        self.own = Blip2VisionModel(Blip2VisionConfig(**sizes))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        embedded = self.own.embeddings(pixels)
        found: torch.Tensor = self.own.encoder(inputs_embeds=embedded).last_hidden_state
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        """By the names of EVA's file."""
        found = {}
        for name, value in self.own.state_dict().items():
            named = name
            for ours, theirs in NAMES.items():
                named = named.replace(ours, theirs)
            found[named] = value
        for name in [name for name in found if name.endswith("qkv.bias")]:
            q, k, v = found.pop(name).chunk(3)
            assert not k.any()
            before = name.removesuffix("qkv.bias")
            found |= {f"{before}q_bias": q, f"{before}v_bias": v}
        return {name: value for name, value in found.items() if "post_" not in name}


class Repository(VideoLLAMA):
    """As the repository puts it together."""

    def __init__(self, text: LlamaForCausalLM) -> None:
        nn.Module.__init__(self)
        self.visual_encoder, self.ln_vision = Eva(), nn.LayerNorm(TOWER)
        self.Qformer = QFormer(WIDTH, TOWER, 2, every=2)
        self.video_Qformer = QFormer(WIDTH, WIDTH, 2, every=1)
        self.query_tokens = nn.Parameter(torch.zeros(1, 2, WIDTH))
        self.video_query_tokens = nn.Parameter(torch.zeros(1, PLACES, WIDTH))
        self.video_frame_position_embedding = nn.Embedding(6, WIDTH)
        self.llama_proj = nn.Linear(WIDTH, text.config.hidden_size)
        self.llama_model, self.IMAGE_PATCH_TOKEN_ID = text, IMAGE


def write_parts(folder: Path) -> Repository:
    """The files that the repository's code loads, with what else stands in them."""
    special, roles = ("<s>", "</s>", "<unk>"), ("bos_token", "eos_token", "unk_token")
    tokenizer = byte_tokenizer(special, **dict(zip(roles, special, strict=True)))
    tokenizer.save_pretrained(folder / "language")
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.15}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "language")
    model = Repository(LlamaForCausalLM.from_pretrained(folder / "language")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("llama_model."):
                parameter.normal_(float("norm.weight" in name.lower()), 0.15)
            if name.endswith("qkv.bias"):
                parameter.unflatten(0, (3, -1))[1].zero_()
    own, none = model.state_dict(), torch.zeros(2)
    torch.save({**model.visual_encoder.weights(), "norm.weight": none}, folder / FILES["vision"])
    blip = {k: v for k, v in own.items() if k.startswith(("Qformer.", "query_", "ln_vision."))}
    layer = "Qformer.bert.encoder.layer.0"
    blip |= dict.fromkeys((f"{layer}.output.dense.bias", "t5_proj.bias", "Qformer.cls.x"), none)
    torch.save({"model": blip}, folder / FILES["qformer"])
    first = ("video_", "llama_proj.")
    trained = {name: value for name, value in own.items() if name.startswith(first)}
    trained |= {"video_Qformer.bert.embeddings.position_ids": none, "audio_llama_proj.bias": none}
    torch.save({"model": trained, "optimizer": {}}, folder / FILES["checkpoint"])
    return model


def converted(folder: Path, template: str = "llama_v2") -> Path:
    pairs = [(f"--{word}", str(folder / file)) for word, file in FILES.items()]
    assert main([*(part for pair in pairs for part in pair), "--template", template]) == 0
    return folder / FILES["output"]


def write_checkpoint(parts: Path) -> Path:
    """A converted checkpoint, and two samples."""
    write_parts(parts)
    folder = converted(parts)
    write_video(folder / "a.mp4")
    write_image(folder / "a.png", (40, 24))
    write_jsonl(
        folder / "train.jsonl",
        chat(("video", "a.mp4"), ("text", "What animal?"), answer="A big rabbit."),
        chat(("text", "Look"), ("image", "a.png"), answer="It is green."),
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("video_llama"))


def test_a_converted_checkpoint_computes_what_the_repository_s_does(tmp_path: Path) -> None:
    theirs = write_parts(tmp_path)
    source = Source.of(str(converted(tmp_path)))
    source.check_tokenizer()
    assert source.processor.tokenizer.convert_ids_to_tokens(IMAGE) == "<ImageHere>"
    model = source.load(torch.float32).eval()
    batch = video_llama_case.make_batch(["v.....", "...v.......", "......."], [5, 1, 0])
    batch["input_ids"][batch["input_ids"] == video_llama_case.VIDEO] = IMAGE
    batch["labels"][batch["input_ids"] == IMAGE] = -100
    videos = [batch["images"][:5], batch["images"][5:]]
    rows = torch.cat([theirs.encode(video.transpose(0, 1)[None])[0] for video in videos])
    text = (batch[key] for key in ("attention_mask", "labels"))
    expected = theirs.language(batch["input_ids"], rows, *text)
    found = model(**batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)
    frozen = {n.partition(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"visual_encoder", "ln_vision", "Qformer", "query_tokens"}
    plan = planned.model(str(tmp_path / "whole"))
    assert (plan.cross.count, plan.cross.mlp, plan.vocabulary) == (2, 48, ROWS)
    assert (plan.tower.count, plan.tower.heads, plan.tower_tokens, plan.frame_tokens) == (
        2,
        2,
        5,
        0,
    )


def change(file: Path, **others: Any) -> None:
    """Take out what is None, and put in the rest."""
    found = torch.load(file)
    inside = {**found.get("model", found), **others}
    torch.save({"model": {k: v for k, v in inside.items() if v is not None}}, file)


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "1 weights, of which llama_proj.bias is missing": ("checkpoint", {"llama_proj.bias": None}),
    "video_Qformer.x is left over": ("checkpoint", {"video_Qformer.x": torch.zeros(1)}),
    "no video Q-Former, but an audio branch": ("checkpoint", {"video_query_tokens": None}),
    "which is no EVA ViT": ("vision", {"pos_embed": None}),
    "lacks query_tokens or ln_vision": ("qformer", {"ln_vision.weight": None}),
    "got files without 'video_frame_position": (
        "checkpoint",
        {"video_frame_position_embedding.weight": None},
    ),
}


@pytest.mark.slow
def test_files_that_do_not_belong_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, (word, others) in BAD.items():
        write_parts(tmp_path)
        change(tmp_path / FILES[word], **others)
        with pytest.raises(SystemExit):
            converted(tmp_path)
        assert words in capsys.readouterr().err
    OPTConfig().save_pretrained(tmp_path / "language")
    with pytest.raises(SystemExit):
        converted(tmp_path)
    assert "a 'opt'; expected a 'llama'" in capsys.readouterr().err


def test_text_and_pixels_are_those_of_the_repository(folder: Path, tmp_path: Path) -> None:
    maker, tokenizer = maker_of(folder, frames=3), Source.of(str(folder)).processor.tokenizer
    first, second = whole_batches(folder, frames=3)
    places, system = "<ImageHere>" * PLACES, "<s>[INST] <<SYS>>\n \n<</SYS>>\n\n"
    told = "The video contains 3 frames sampled at 0.2, 0.8, 1.3 seconds. "
    assert tokenizer.decode(first["input_ids"][0]) == (
        f"{system}<Video>{places}</Video> {told}What animal? [/INST] A big rabbit. </s>"
    )
    assert tokenizer.decode(second["input_ids"][0]) == (
        f"{system}Look<Image>{places}</Image>  [/INST] It is green. </s>"
    )
    learnt = second["labels"][0] != -100
    assert tokenizer.decode(second["input_ids"][0][learnt]) == "It is green. </s>"
    assert first["images"].shape == (3, 3, SIDE, SIDE)
    both = maker.batch(read_conversations(folder / "train.jsonl")).inputs
    assert both["images_per_sample"].tolist() == [3, 1]
    picture = Image.open(folder / "a.png").convert("RGB").resize((SIDE, SIDE), resample=3)
    red = (torch.tensor(picture.getpixel((5, 7))[0]) / 255 - 0.48145466) / 0.26862954
    torch.testing.assert_close(second["images"][0, 0, 7, 5], red)
    write_parts(tmp_path)
    vicuna = Source.of(str(converted(tmp_path, "vicuna"))).processor.tokenizer
    assert vicuna.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Me."}]},
        ],
        tokenize=False,
    ) == ("<s>\n\n###Human: Who?\n###Assistant: Me.\n###")


def test_a_sample_has_one_video_of_frames_that_can_be_numbered(folder: Path) -> None:
    two = folder / "two.jsonl"
    write_jsonl(two, chat(("image", "a.png"), ("video", "a.mp4"), ("text", "Look")))
    with pytest.raises(DataError, match=r"two.jsonl.* got 2 videos or images of 4 frames"):
        maker_of(folder, frames=3).batch(read_conversations(two))
    with pytest.raises(DataError, match=r"of 7 frames; expected one a sample, of at most 6"):
        maker_of(folder, frames=7).batch(read_conversations(folder / "train.jsonl"))


def loss_and_gradients(source: Source, batch: dict[str, Any]) -> Any:
    """Of a model on one rank, and the loss of its own forward."""
    model = source.load(torch.float32)
    expected = model(**batch).loss
    patched_by(video_llama_case.ds_config(stage=0, sp_size=1, self_attn="ring"), model)
    loss = model(**shard_batch(batch, model=model, frames="local")).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_tiny_one_is_made_of_nothing(folder: Path) -> None:
    source = Source.of("tiny:video_llama")
    source.check_tokenizer()
    encoder = TextEncoder(source.processor, source.max_length(None), family=source.family)
    maker = BatchMaker(encoder, FrameRate(count=3), owned=range)
    batch = dict(maker.batch(read_conversations(folder / "train.jsonl")).inputs)
    grads = loss_and_gradients(source, batch)
    silent = {name for name, grad in grads.items() if grad is None or not grad.any()}
    assert silent == set()


@pytest.mark.exhaustive  # its Q-Formers are of the published size
def test_a_comparison_trains_a_model_of_random_weights(folder: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"a Video-LLaMA with qformer .*; expected"):
        case_of(str(folder))
    case = cut(random_case("video_llama"), hidden=128, cross_layers=1, vision_layers=1)
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "image_size": 28}
    case = replace(case, **sizes, vocabulary=96, text_tokens=8)
    assert case.frame_tokens == 32
    model, layout = compared(case, frames=2, method="lvx")
    assert layout.text.kv_lengths == (32 + 8,)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert parts_of(model, case) == {"cross_attention", "text", "vision"}
    with pytest.raises(ValueError, match="got 5000 frames; expected at most 4096"):
        make_batch(case, frames=(), total=5000)


@pytest.mark.slow
def test_finetune_trains_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    config = json.loads(Path(write_config(tmp_path / "ds.json", stage=3)).read_text())
    patterns = FAMILIES.named("video_llama").patterns
    config["ds_lvx"]["layers"] = [
        {"match": patterns["local"], "method": "none"},
        {"match": patterns["self"], "method": "ulysses"},
    ]
    loss = first_loss(folder, tmp_path, config, frames=3)
    model = Source.of(str(folder)).load(torch.float32)
    start = [model(**batch).loss.item() for batch in whole_batches(folder, frames=3)]
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
    trained = Source.of(str(tmp_path / "out" / "model")).load(torch.float32)
    moved = {
        name.partition(".")[0]
        for (name, old), new in zip(model.named_parameters(), trained.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert moved == {
        "llama_model",
        "llama_proj",
        "video_Qformer",
        "video_frame_position_embedding",
        "video_query_tokens",
    }
