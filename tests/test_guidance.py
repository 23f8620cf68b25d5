"""Classifier-free guidance: of the first chunk alone, by the formula, and away from what was named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import (
    HEIGHT,
    WIDTH,
    build_pipeline,
    build_rollout,
    build_text,
    build_transformer,
    relative_l2,
)
from vidkv.attention import FullAttention
from vidkv.errors import InputError, PromptError
from vidkv.models.bounce.prompts import FAMILIES, WORLDS, ScenePrompt, World, contrast, parse
from vidkv.models.bounce.world import sample_scenes
from vidkv.models.registry import contrast_prompt, weights_folder
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.pipeline import MODELS, CausalVideoPipeline
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule

GUIDED = FlowSchedule((1000, 500), shift=1.0, sampler="euler", first_chunk_guidance=3.0, guided_down_to=0.6)
PROMPT, OTHER = "a red circle bouncing", "a blue square resting"
SIZE = {"height": HEIGHT, "width": WIDTH, "num_frames": 21, "output_type": "latent"}


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer3DModel:
    return build_transformer()


def rollout(
    model: CausalWanTransformer3DModel, schedule: FlowSchedule = GUIDED, negative: bool = True
) -> Rollout:
    made = build_rollout("fp32,window=9,sink=2", transformer=model, schedule=schedule)
    made.set_text(build_text(model, seed=1), build_text(model, seed=2) if negative else None)
    return made


def test_the_formula(model: CausalWanTransformer3DModel) -> None:
    """Guided from noise level 1 to 0.5, unguided from there, step by step with full attention."""
    attention = FullAttention(2, 3)
    texts = build_text(model, seed=1), build_text(model, seed=2)
    made = rollout(model)
    x = made.noise.initial(0, 0, 3)

    def flow(x: Tensor, sigma: float, which: int) -> Tensor:
        return model(x, torch.full((1, 3), 1000 * sigma), texts[which], attention)

    with torch.no_grad():
        x = x - 0.5 * (flow(x, 1.0, 1) + 3 * (flow(x, 1.0, 0) - flow(x, 1.0, 1)))
        x = x - 0.5 * flow(x, 0.5, 0)
    assert relative_l2(made.step_chunk().latents, x) <= 1e-5


def test_only_the_first_chunk_is_guided(model: CausalWanTransformer3DModel) -> None:
    guided, plain = rollout(model), rollout(model, negative=False)
    first = guided.step_chunk().latents
    assert relative_l2(first, plain.step_chunk().latents) > 0.01
    again = rollout(model, negative=False)
    again.append(first)
    assert torch.equal(guided.step_chunk().latents, again.step_chunk().latents)


def test_a_fork_is_guided_too(model: CausalWanTransformer3DModel) -> None:
    made = rollout(model)
    assert torch.equal(made.fork().step_chunk().latents, made.step_chunk().latents)


@pytest.mark.parametrize("bad", [0.5, -1.0, math.nan, math.inf])
def test_scales_that_cannot_be(bad: float) -> None:
    with pytest.raises(InputError, match="guidance scale"):
        FlowSchedule(first_chunk_guidance=bad)


def test_the_interval() -> None:
    with pytest.raises(InputError, match="guided_down_to"):
        FlowSchedule(guided_down_to=1.5)
    steps = ((0, 1.0), (0, 0.6), (0, 0.5), (1, 1.0))
    assert [GUIDED.guidance_at(chunk, sigma) for chunk, sigma in steps] == [3.0, 3.0, 1.0, 1.0]
    assert GUIDED.with_steps(4).first_chunk_guidance == 3.0


class TestPipeline:
    def test_arguments(self) -> None:
        """A scale of 1 is no guidance; a negative prompt leads elsewhere than the model's contrast."""
        pipe = build_pipeline(first_chunk_guidance=2.0, guided_down_to=0.3)
        guided = pipe(PROMPT, **SIZE).frames
        plain = pipe(PROMPT, guidance_scale=1.0, **SIZE).frames
        assert torch.equal(plain, build_pipeline()(PROMPT, **SIZE).frames)
        assert torch.equal(guided, build_pipeline()(PROMPT, guidance_scale=2.0, **SIZE).frames)
        assert relative_l2(guided, plain) > 0.001
        away = pipe(PROMPT, negative_prompt=OTHER, **SIZE).frames
        assert relative_l2(away, guided) > 0.001
        own = contrast_prompt(pipe.config.prompt_grammar)(PROMPT)
        assert torch.equal(pipe(PROMPT, negative_prompt=own, **SIZE).frames, guided)

    def test_bad_arguments(self) -> None:
        pipe = build_pipeline()
        with pytest.raises(InputError, match=r"guidance scale 0\.5"):
            pipe(PROMPT, guidance_scale=0.5, **SIZE)
        with pytest.raises(PromptError, match="'zebra'"):
            pipe(PROMPT, guidance_scale=2.0, negative_prompt="a zebra", **SIZE)

    def test_settings_survive(self, tmp_path: Path) -> None:
        build_pipeline(first_chunk_guidance=2.5, guided_down_to=0.4).save_pretrained(tmp_path)
        loaded = CausalVideoPipeline.from_pretrained(tmp_path)
        assert (loaded.schedule.first_chunk_guidance, loaded.schedule.guided_down_to) == (2.5, 0.4)

    def test_the_shipped_model_is_guided(self) -> None:
        folder = weights_folder(MODELS["bounce"])
        assert folder is not None
        settings = json.loads((folder / "model_index.json").read_text())
        assert settings["first_chunk_guidance"] > 1


class TestContrast:
    @pytest.mark.parametrize("world", WORLDS.values(), ids=list(WORLDS))
    def test_shares_nothing_but_the_kind_of_scene(self, world: World) -> None:
        generator = torch.Generator().manual_seed(0)
        for prompt in sample_scenes(200, generator, None, torch.tensor([20]), world).prompts():
            other = contrast(prompt, world)
            assert other.family == prompt.family and other.event is None
            assert len(other.objects) == len(prompt.objects)
            assert not {colour for colour, _ in other.objects} & {colour for colour, _ in prompt.objects}
            assert all(a[1] != b[1] for a, b in zip(other.objects, prompt.objects, strict=True))
            assert parse(other.text(), world) == other

    def test_free_text_is_contrasted_with_nothing(self) -> None:
        assert contrast_prompt(None)("a cat walks on the grass") == ""

    def test_every_family(self) -> None:
        for family in FAMILIES:
            text = ScenePrompt((("red", "circle"),), family).text()
            assert parse(contrast_prompt("bounce:narrow")(text)).family == family
