"""A LoRA changes the weights by scale·(alpha/r)·up·down, whatever its file looks like, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.tiny import (
    HEIGHT,
    WIDTH,
    build_pipeline,
    build_rollout,
    build_text,
    build_transformer,
    generator,
    noise,
    relative_l2,
)
from vidkv.attention import FullAttention
from vidkv.errors import CheckpointError, InputError, StateError
from vidkv.models.lora import LoraPipelineMixin, fingerprint, load_adapter, merge_lora
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.models.weights import set_precision
from vidkv.pipeline import CausalVideoPipeline
from vidkv.state import load_rollout, save_rollout

RANK = 4
Pairs = dict[str, tuple[Tensor, Tensor]]
"""(down, up) by diffusers' names."""
WAN_NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def pairs_for(model: nn.Module, seed: int = 1, rank: int = RANK, blocks: int = 2) -> Pairs:
    """Random factors for every linear layer of the blocks; the update is about as large as the weights."""
    source = generator(seed)
    found: Pairs = {}
    for block in range(blocks):
        for leaf in WAN_NAMES:
            name = f"blocks.{block}.{leaf}"
            rows, columns = model.get_submodule(f"blocks.0.{leaf}").weight.shape  # type: ignore[misc]
            down = torch.randn(rank, columns, generator=source) / columns**0.5
            found[name] = down, torch.randn(rows, rank, generator=source) * 0.3
    return found


def diffusers_file(pairs: Pairs) -> dict[str, Tensor]:
    return {
        f"transformer.{name}.lora_{side}.weight": tensor
        for name, (down, up) in pairs.items()
        for side, tensor in (("A", down), ("B", up))
    }


def wan_name(name: str) -> str:
    _, block, leaf = name.split(".", 2)
    return f"blocks.{block}.{WAN_NAMES[leaf]}"


def comfy_file(pairs: Pairs, alpha: float = RANK) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        layer = f"diffusion_model.{wan_name(name)}"
        state |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        state[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return state


def kohya_file(pairs: Pairs, alpha: float = RANK) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        layer = "lora_unet_" + wan_name(name).replace(".", "_")
        state |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        state[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return state


def peft_file(pairs: Pairs) -> dict[str, Tensor]:
    return {
        f"base_model.model.{wan_name(name)}.lora_{side}.default.weight": tensor
        for name, (down, up) in pairs.items()
        for side, tensor in (("A", down), ("B", up))
    }


def renamed(change: Callable[[str], str]) -> Callable[[Pairs], dict[str, Tensor]]:
    return lambda pairs: {change(name): tensor for name, tensor in peft_file(pairs).items()}


LAYOUTS: dict[str, Callable[[Pairs], dict[str, Tensor]]] = {
    "diffusers": diffusers_file,
    "diffusers, bare": lambda p: {k.removeprefix("transformer."): v for k, v in diffusers_file(p).items()},
    "comfy": comfy_file,
    "comfy, lora_A": renamed(
        lambda n: n.replace("base_model.model.", "diffusion_model.").replace(".default", "")
    ),
    "kohya": kohya_file,
    "kohya, two underscores": lambda p: {
        k.replace("lora_unet_", "lora_unet__"): v for k, v in kohya_file(p).items()
    },
    "peft": peft_file,
    "longlive": renamed(lambda n: "generator_lora." + n.replace(".default", "")),
    "fsdp": renamed(
        lambda n: n.replace("base_model.model.", "base_model.model.model._fsdp_wrapped_module.").replace(
            ".self_attn", "._fsdp_wrapped_module.self_attn"
        )
    ),
}


def saved(path: Path, state: dict[str, Tensor], header: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, header)
    return path


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def added(base: dict[str, Tensor], *updates: tuple[Pairs, float]) -> dict[str, Tensor]:
    """base + factor·up·down, written out."""
    found = dict(base)
    for pairs, factor in updates:
        for name, (down, up) in pairs.items():
            found[f"{name}.weight"] = found[f"{name}.weight"] + factor * (up @ down)
    return found


def with_weights(state: dict[str, Tensor]) -> CausalWanTransformer3DModel:
    model = build_transformer()
    model.load_state_dict(state)
    return model


@torch.no_grad()
def output(model: CausalWanTransformer3DModel) -> Tensor:
    """Text keys and values are computed anew: adapters change them too."""
    x, timestep = noise(2, 3, 4, 4, 6), torch.tensor([[500.0, 20.0, 0.0]] * 2)
    found: Tensor = model(x.to(model.dtype), timestep, build_text(model, 2), FullAttention(2, 3))
    return found.float()


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return weights(build_transformer())


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return pairs_for(build_transformer())


@pytest.fixture(scope="module")
def others() -> Pairs:
    return pairs_for(build_transformer(), seed=2, rank=3)


class TestMerge:
    @pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
    def test_adds_the_product(
        self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path, scale: float
    ) -> None:
        state = dict(base)
        assert merge_lora(state, saved(tmp_path / "l.safetensors", comfy_file(pairs, 2.0)), scale) == 20
        wanted = added(base, (pairs, scale * (2.0 / RANK)))
        for name, tensor in state.items():
            assert torch.equal(tensor, wanted[name]), name
            changed = name.removesuffix(".weight") in pairs and name.endswith(".weight")
            assert torch.equal(tensor, base[name]) == (not changed), name

    def test_scale_zero_is_the_base(self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path) -> None:
        state = dict(base)
        assert merge_lora(state, saved(tmp_path / "l.safetensors", peft_file(pairs)), 0.0) == 20
        assert all(torch.equal(state[name], base[name]) for name in base)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_layout_is_the_same_lora(
        self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path, layout: str
    ) -> None:
        state = dict(base)
        assert merge_lora(state, saved(tmp_path / "l.safetensors", LAYOUTS[layout](pairs))) == 20
        wanted = added(base, (pairs, 1.0))
        assert all(torch.equal(state[name], wanted[name]) for name in base)

    def test_half_precision_is_rounded_once(
        self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path
    ) -> None:
        state = {name: tensor.bfloat16() for name, tensor in base.items()}
        stored = {name: tensor.half() for name, tensor in diffusers_file(pairs).items()}
        merge_lora(state, saved(tmp_path / "l.safetensors", stored), 0.7)
        for name, (down, up) in pairs.items():
            exact = base[f"{name}.weight"].bfloat16().float() + 0.7 * (
                up.half().float() @ down.half().float()
            )
            assert torch.equal(state[f"{name}.weight"], exact.bfloat16()), name

    def test_equals_peft_on_the_stock_model(self, base: dict[str, Tensor], tmp_path: Path) -> None:
        """Keys as LongLive's training script writes them, and peft's own merge as the truth."""
        stock = StockBlocks(base)
        targets = [name for name, module in stock.named_modules() if isinstance(module, nn.Linear)]
        wrapped = get_peft_model(stock, LoraConfig(r=6, lora_alpha=9, target_modules=targets))
        source = generator(3)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=source) * 0.2
        keys = get_peft_model_state_dict(wrapped)
        assert "base_model.model.blocks.0.self_attn.q.lora_A.weight" in keys
        stored = {f"generator_lora.{name}": tensor.detach().clone() for name, tensor in keys.items()}
        path = saved(tmp_path / "lora.safetensors", stored)
        state = dict(base)
        assert merge_lora(state, path, alpha=9) == len(targets) == 20
        truth = wrapped.merge_and_unload().state_dict()
        for name in pairs_for(build_transformer()):
            wanted = truth[f"{wan_name(name)}.weight"]
            assert relative_l2(state[f"{name}.weight"], wanted) <= 1e-6
            assert relative_l2(base[f"{name}.weight"], wanted) > 0.1

    def test_equals_diffusers_conversions(
        self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path
    ) -> None:
        for file in (comfy_file(pairs, 3.0), kohya_file(pairs, 3.0)):
            # diffusers scales in place
            theirs = WanLoraLoaderMixin.lora_state_dict({k: v.clone() for k, v in file.items()})
            state = dict(base)
            merge_lora(state, saved(tmp_path / "l.safetensors", file))
            for name in pairs:
                stem = f"transformer.{name}.lora_"
                wanted = base[f"{name}.weight"] + theirs[f"{stem}B.weight"] @ theirs[f"{stem}A.weight"]
                assert relative_l2(state[f"{name}.weight"], wanted) <= 1e-6


class StockBlocks(nn.Module):
    """The blocks' linear layers under the stock code's names."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self._block(state, block) for block in range(2))

    @staticmethod
    def _block(state: dict[str, Tensor], block: int) -> nn.Module:
        def linear(leaf: str) -> nn.Linear:
            weight = state[f"blocks.{block}.{leaf}.weight"]
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.weight.data.copy_(weight)
            return layer

        module = nn.Module()
        for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            attention = nn.Module()
            for name, leaf in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
                attention.add_module(name, linear(f"{new}.{leaf}"))
            module.add_module(old, attention)
        module.ffn = nn.Sequential(linear("ffn.net.0.proj"), nn.GELU("tanh"), linear("ffn.net.2"))
        return module


class TestAlpha:
    """From the tensors, else from the header or peft's configuration, else the argument, else the rank."""

    def factor(self, base: dict[str, Tensor], pairs: Pairs, source: Path, **options: Any) -> float:
        """By how much the product was multiplied."""
        state = dict(base)
        merge_lora(state, source, **options)
        name = "blocks.1.attn2.to_k"
        down, up = pairs[name]
        update, product = state[f"{name}.weight"] - base[f"{name}.weight"], up @ down
        return round(float((update * product).sum() / product.square().sum()), 4)

    def test_argument(self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path) -> None:
        path = saved(tmp_path / "l.safetensors", diffusers_file(pairs))
        assert self.factor(base, pairs, path) == 1.0
        assert self.factor(base, pairs, path, alpha=10.0) == 2.5
        assert self.factor(base, pairs, path, alpha=10.0, scale=0.5) == 1.25

    def test_tensors_come_first(self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path) -> None:
        path = saved(tmp_path / "l.safetensors", kohya_file(pairs, 1.0))
        assert self.factor(base, pairs, path, alpha=10.0) == 0.25

    def test_header_of_diffusers(self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path) -> None:
        settings = {"transformer.r": RANK, "transformer.lora_alpha": 2}
        header = {"lora_adapter_metadata": json.dumps(settings)}
        path = saved(tmp_path / "l.safetensors", diffusers_file(pairs), header)
        assert self.factor(base, pairs, path, alpha=10.0) == 0.5

    def test_configuration_of_peft(self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path) -> None:
        saved(tmp_path / "adapter_model.safetensors", peft_file(pairs))
        config: dict[str, Any] = {"r": RANK, "lora_alpha": 12}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert self.factor(base, pairs, tmp_path) == 3.0
        config["alpha_pattern"] = {"blocks.1.cross_attn.k": 6}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert self.factor(base, pairs, tmp_path) == 1.5


class TestAdapter:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_output_is_that_of_the_merged_model(
        self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path, layout: str
    ) -> None:
        model = with_weights(base)
        path = saved(tmp_path / "l.safetensors", LAYOUTS[layout](pairs))
        assert load_adapter(model, path, "style") == "style"
        wanted = output(with_weights(added(base, (pairs, 1.0))))
        assert relative_l2(output(model), wanted) <= 1e-5
        assert relative_l2(output(with_weights(base)), wanted) > 0.1

    def test_alpha_and_weight(self, base: dict[str, Tensor], pairs: Pairs) -> None:
        model = with_weights(base)
        load_adapter(model, comfy_file(pairs, 2.0), "style", weight=0.5)
        assert relative_l2(output(model), output(with_weights(added(base, (pairs, 0.25))))) <= 1e-5
        model.set_adapters("style", 3.0)
        assert relative_l2(output(model), output(with_weights(added(base, (pairs, 1.5))))) <= 1e-5
        model.set_adapters("style", 0.0)
        assert torch.equal(output(model), output(with_weights(base)))

    def test_ranks_and_alphas_may_differ_between_layers(
        self, base: dict[str, Tensor], pairs: Pairs, others: Pairs
    ) -> None:
        first = {name: pair for name, pair in pairs.items() if ".attn1." in name}
        second = {name: pair for name, pair in others.items() if ".attn1." not in name}
        model = with_weights(base)
        load_adapter(model, comfy_file(first, 2.0) | comfy_file(second, 12.0))
        wanted = output(with_weights(added(base, (first, 0.5), (second, 4.0))))
        assert relative_l2(output(model), wanted) <= 1e-5

    def test_layers_outside_the_blocks(self, base: dict[str, Tensor]) -> None:
        names = {
            "proj_out": "head.head",
            "condition_embedder.time_proj": "time_projection.1",
            "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        }
        source = generator(4)
        stored: dict[str, Tensor] = {}
        wanted = dict(base)
        for name, wan in names.items():
            rows, columns = base[f"{name}.weight"].shape
            down = torch.randn(2, columns, generator=source) * 0.2
            up = torch.randn(rows, 2, generator=source) * 0.2
            stored |= {f"diffusion_model.{wan}.lora_down.weight": down}
            stored |= {f"diffusion_model.{wan}.lora_up.weight": up}
            wanted[f"{name}.weight"] = base[f"{name}.weight"] + up @ down
        model = with_weights(base)
        load_adapter(model, stored)
        assert relative_l2(output(model), output(with_weights(wanted))) <= 1e-5

    def test_several_at_once(self, base: dict[str, Tensor], pairs: Pairs, others: Pairs) -> None:
        model = with_weights(base)
        load_adapter(model, peft_file(pairs), "style")
        load_adapter(model, kohya_file(others, 3.0), "motion")
        assert model.active_adapters() == ["motion"]
        assert relative_l2(output(model), output(with_weights(added(base, (others, 1.0))))) <= 1e-5
        model.set_adapters(["style", "motion"], [0.75, -0.5])
        both = added(base, (pairs, 0.75), (others, -0.5))
        assert relative_l2(output(model), output(with_weights(both))) <= 1e-5
        model.delete_adapters("style")
        assert relative_l2(output(model), output(with_weights(added(base, (others, -0.5))))) <= 1e-5

    def test_fused_is_loaded_is_merged(self, base: dict[str, Tensor], pairs: Pairs) -> None:
        model = with_weights(base)
        load_adapter(model, peft_file(pairs), "style", weight=0.5)
        loaded = output(model)
        model.fuse_lora()
        assert relative_l2(output(model), loaded) <= 1e-5
        with pytest.raises(InputError, match="style are fused"):
            load_adapter(model, peft_file(pairs), "other")
        model.unload_lora()
        wanted = added(base, (pairs, 0.5))
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
            name: tensor.shape for name, tensor in base.items()
        }
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)

    def test_unfused_again(self, base: dict[str, Tensor], pairs: Pairs) -> None:
        model = with_weights(base)
        load_adapter(model, peft_file(pairs), "style")
        model.fuse_lora()
        fused = weights(model)
        model.unfuse_lora()
        model.disable_adapters()
        assert relative_l2(output(model), output(with_weights(base))) <= 1e-5
        assert any(not torch.equal(fused[name], tensor) for name, tensor in model.state_dict().items())

    def test_unloading_restores_every_bit(self, base: dict[str, Tensor], pairs: Pairs, others: Pairs) -> None:
        model = with_weights(base)
        load_adapter(model, peft_file(pairs), "style")
        load_adapter(model, peft_file(others), "motion", weight=0.3)
        output(model)
        model.unload_lora()
        assert list(model.state_dict()) == list(base)
        assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(output(model), output(with_weights(base)))

    def test_no_gradients_no_training_mode_no_tie_to_the_source(
        self, base: dict[str, Tensor], pairs: Pairs
    ) -> None:
        model = with_weights(base)
        source = {name: tensor.clone() for name, tensor in peft_file(pairs).items()}
        load_adapter(model, source)
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(module.training for module in model.modules())
        before = output(model)
        for tensor in source.values():
            tensor.zero_()
        assert torch.equal(output(model), before)

    def test_bfloat16(self, base: dict[str, Tensor], pairs: Pairs) -> None:
        model = with_weights(base).bfloat16()
        load_adapter(model, peft_file(pairs))
        wanted = output(with_weights(added(base, (pairs, 1.0))))
        assert model.blocks[0].attn1.to_q.lora_A["default_0"].weight.dtype == torch.bfloat16
        assert relative_l2(output(model), wanted) <= 0.05

    @pytest.mark.parametrize("precision", ["fp8", "int8"])
    def test_beside_weights_in_eight_bits(
        self, base: dict[str, Tensor], pairs: Pairs, precision: Any
    ) -> None:
        model = with_weights(base)
        set_precision(model, precision, torch.float32)
        stored = with_weights(base)
        set_precision(stored, precision, torch.float32)
        load_adapter(model, peft_file(pairs))
        wanted = output(with_weights(added(base, (pairs, 1.0))))
        bound = 1.5 * relative_l2(output(stored), output(with_weights(base)))
        assert relative_l2(output(model), wanted) <= bound < 0.2


def broken(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Pairs], dict[str, Tensor]]:
    def build(pairs: Pairs) -> dict[str, Tensor]:
        state = {name: tensor.clone() for name, tensor in comfy_file(pairs).items()}
        change(state)
        return state

    return build


Q = "diffusion_model.blocks.0.self_attn.q"
MALFORMED: dict[str, tuple[Callable[[Pairs], dict[str, Tensor]], str]] = {
    "empty": (lambda p: {"x.alpha": torch.ones(())}, "holds no LoRA factors"),
    "no factors": (broken(lambda s: s.update({"foo.weight": torch.ones(2)})), "foo.weight is no LoRA factor"),
    "bias difference": (
        broken(lambda s: s.update({f"{Q}.diff_b": torch.ones(48)})),
        r"self_attn.q.diff_b is the difference of a bias.*1 of 61",
    ),
    "norm difference": (
        broken(lambda s: s.update({"diffusion_model.blocks.0.norm3.diff": torch.ones(48)})),
        "norm3.diff is the difference of a whole weight",
    ),
    "dora": (broken(lambda s: s.update({f"{Q}.dora_scale": torch.ones(48)})), "part of a DoRA"),
    "lora bias": (broken(lambda s: s.update({f"{Q}.lora_B.bias": torch.ones(48)})), "a bias of the LoRA"),
    "more blocks": (
        lambda p: comfy_file(pairs_for(build_transformer(), blocks=5)),
        r"is for block 2, the model has blocks 0 to 1 \(30 of 50",
    ),
    "more blocks, kohya": (
        lambda p: kohya_file(pairs_for(build_transformer(), blocks=3)),
        "is for block 2, the model has blocks 0 to 1",
    ),
    "image layers": (
        broken(
            lambda s: s.update(
                {f"{Q[:24]}.cross_attn.k_img.lora_{n}.weight": torch.ones(1) for n in ("down", "up")}
            )
        ),
        r"cross_attn.k_img.lora_down.weight has no place in the model \(1 of 21",
    ),
    "another model": (
        lambda p: {f"unet.mid.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"},
        "none of its 1 layers is in the model, the first is unet.mid.to_q.lora_A.weight",
    ),
    "a wider model": (
        lambda p: comfy_file(pairs_for(build_transformer(attention_head_dim=64))),
        r"lora_down.weight is \(4, 128\), for blocks.0.attn\S+ of \(48, 48\) it should be \(4, 48\)",
    ),
    "ranks that disagree": (
        broken(lambda s: s.update({f"{Q}.lora_up.weight": torch.ones(48, 5)})),
        r"q.lora_up.weight is \(48, 5\), .* should be \(48, 4\)",
    ),
    "one factor": (broken(lambda s: [s.pop(f"{Q}.lora_up.weight")] and None), "q.lora_down.weight has no up"),
    "alpha alone": (
        broken(lambda s: s.update({"diffusion_model.head.head.alpha": torch.ones(())})),
        "head.head.alpha has no LoRA factors",
    ),
    "alpha of a vector": (
        broken(lambda s: s.update({f"{Q}.alpha": torch.ones(3)})),
        "an alpha is one number",
    ),
    "alpha nan": (broken(lambda s: s.update({f"{Q}.alpha": torch.tensor(torch.nan)})), "alpha of .* is nan"),
    "nan": (
        broken(lambda s: [s[f"{Q}.lora_up.weight"][3].fill_(torch.nan)] and None),
        "lora_up.weight holds NaN",
    ),
    "infinity": (
        broken(lambda s: [s[f"{Q}.lora_down.weight"][3].fill_(torch.inf)] and None),
        "lora_down.weight holds NaN or infinity",
    ),
    "integers": (
        broken(lambda s: s.update({f"{Q}.lora_up.weight": torch.ones(48, 4, dtype=torch.int8)})),
        "dtype torch.int8",
    ),
    "two adapters": (
        lambda p: peft_file(p) | {k.replace("default", "ema"): v + 0 for k, v in peft_file(p).items()},
        r"lora_A.ema.weight and .*lora_A.default.weight are both for blocks.0",
    ),
    "two layouts": (lambda p: comfy_file(p) | diffusers_file(p), "is a second LoRA of blocks.0.attn"),
}


class TestMalformed:
    @pytest.mark.parametrize("case", MALFORMED)
    def test_is_refused_and_changes_nothing(
        self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path, case: str
    ) -> None:
        build, message = MALFORMED[case]
        stored = {name: tensor.clone() for name, tensor in build(pairs).items()}
        path = saved(tmp_path / "l.safetensors", stored)
        state = dict(base)
        with pytest.raises(CheckpointError, match=message) as caught:
            merge_lora(state, path)
        assert "l.safetensors" in str(caught.value) and "\n" not in str(caught.value)
        assert all(state[name] is base[name] for name in base)
        model = with_weights(base)
        with pytest.raises(CheckpointError, match=message):
            load_adapter(model, stored)
        assert list(model.state_dict()) == list(base)

    def test_files(self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path) -> None:
        def refused(path: Path, message: str) -> None:
            with pytest.raises(CheckpointError, match=message):
                merge_lora(dict(base), path)

        refused(tmp_path / "none.safetensors", "there is no LoRA .*none.safetensors")
        refused(tmp_path, "it has none")
        whole = saved(tmp_path / "a.safetensors", peft_file(pairs))
        (tmp_path / "b.safetensors").write_bytes(whole.read_bytes()[:-100])
        refused(tmp_path / "b.safetensors", "damaged")
        refused(tmp_path, "it has a.safetensors, b.safetensors; name the file")
        (tmp_path / "lora.pt").write_bytes(b"\x80\x04.")
        refused(tmp_path / "lora.pt", "vidkv convert")
        header = {"lora_adapter_metadata": "[]"}
        refused(saved(tmp_path / "h.safetensors", peft_file(pairs), header), "no JSON object")
        header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": "much"})}
        refused(saved(tmp_path / "i.safetensors", peft_file(pairs), header), "lora_alpha .* unusable")
        header = {"lora_adapter_metadata": json.dumps({"transformer.use_rslora": True})}
        refused(saved(tmp_path / "j.safetensors", peft_file(pairs), header), "use_rslora")

    def test_no_tensor(self) -> None:
        with pytest.raises(CheckpointError, match="'x' of type int"):
            load_adapter(build_transformer(), {"x": 3})  # type: ignore[dict-item]

    def test_weights_in_eight_bits_are_not_merged_into(
        self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path
    ) -> None:
        state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in base.items()}
        with pytest.raises(CheckpointError, match="float8_e4m3fn"):
            merge_lora(state, saved(tmp_path / "l.safetensors", peft_file(pairs)))

    def test_names_and_weights(self, base: dict[str, Tensor], pairs: Pairs) -> None:
        model = with_weights(base)
        load_adapter(model, peft_file(pairs), "style")
        with pytest.raises(InputError, match="'style' is in use"):
            load_adapter(model, peft_file(pairs), "style")
        with pytest.raises(InputError, match="has a dot"):
            load_adapter(model, peft_file(pairs), "a.b")
        with pytest.raises(InputError, match="'motion' is not loaded"):
            load_adapter(model, peft_file(pairs), "motion", hotswap=True)
        with pytest.raises(InputError, match="nan"):
            load_adapter(model, peft_file(pairs), "motion", weight=float("nan"))


class LoraPipeline(CausalVideoPipeline, LoraPipelineMixin):
    pass


@pytest.fixture
def pipe() -> Iterator[LoraPipeline]:
    plain = build_pipeline()
    yield LoraPipeline(**plain.components, steps=[1000, 500], prompt_grammar="bounce:wide")


def latents(pipe: CausalVideoPipeline) -> Tensor:
    found: Tensor = pipe(
        "a red circle bouncing", HEIGHT, WIDTH, num_frames=21, seed=3, output_type="latent"
    ).frames
    return found


class TestPipeline:
    """diffusers' methods, on whole rollouts."""

    def test_a_session(
        self, pipe: LoraPipeline, base: dict[str, Tensor], pairs: Pairs, others: Pairs, tmp_path: Path
    ) -> None:
        saved(tmp_path / "style.safetensors", comfy_file(pairs, 1.0))
        plain = latents(pipe)
        pipe.load_lora_weights(tmp_path, weight_name="style.safetensors", adapter_name="style")
        pipe.load_lora_weights(kohya_file(others, 3.0), adapter_name="motion")
        assert pipe.get_list_adapters() == {"transformer": ["style", "motion"]}
        pipe.set_adapters(["style", "motion"], [0.8, 0.4])
        assert pipe.get_active_adapters() == ["style", "motion"]
        loaded = latents(pipe)
        merged = build_pipeline()
        merged.transformer.load_state_dict(added(base, (pairs, 0.2), (others, 0.4)))
        assert relative_l2(loaded, latents(merged)) <= 1e-4
        assert relative_l2(loaded, plain) > 0.1
        pipe.fuse_lora()
        assert pipe.num_fused_loras == 2
        assert relative_l2(latents(pipe), loaded) <= 1e-4
        with pytest.raises(InputError, match="motion, style are fused"):
            pipe.set_adapters("style", 0.1)
        pipe.unfuse_lora()
        assert pipe.num_fused_loras == 0
        pipe.set_adapters("style")
        pipe.delete_adapters("motion")
        assert pipe.get_list_adapters() == {"transformer": ["style"]}
        pipe.disable_lora()
        assert relative_l2(latents(pipe), plain) <= 1e-4

    def test_unloaded_is_as_before(self, pipe: LoraPipeline, pairs: Pairs) -> None:
        plain = latents(pipe)
        pipe.load_lora_weights(peft_file(pairs))
        assert relative_l2(latents(pipe), plain) > 0.1
        pipe.unload_lora_weights()
        assert torch.equal(latents(pipe), plain)

    def test_what_diffusers_saves_is_read(self, pipe: LoraPipeline, pairs: Pairs, tmp_path: Path) -> None:
        pipe.load_lora_weights(comfy_file(pairs, 1.0), adapter_name="style")
        loaded = latents(pipe)
        pipe.transformer.save_lora_adapter(tmp_path, "style")
        pipe.unload_lora_weights()
        pipe.load_lora_weights(tmp_path)
        assert torch.equal(latents(pipe), loaded)

    def test_swapped_in_place(self, pipe: LoraPipeline, pairs: Pairs) -> None:
        again = pairs_for(build_transformer(), seed=5)
        pipe.load_lora_weights(peft_file(again), adapter_name="style")
        wanted = latents(pipe)
        pipe.unload_lora_weights()
        pipe.load_lora_weights(peft_file(pairs), adapter_name="style")
        pipe.load_lora_weights(peft_file(again), adapter_name="style", hotswap=True)
        assert pipe.get_list_adapters() == {"transformer": ["style"]}
        assert torch.equal(latents(pipe), wanted)

    def test_mistakes(self, pipe: LoraPipeline, pairs: Pairs) -> None:
        pipe.load_lora_weights(peft_file(pairs), adapter_name="style")
        with pytest.raises(InputError, match="motion"):
            pipe.set_adapters("motion")
        with pytest.raises(InputError, match="weights 2"):
            pipe.set_adapters("style", [1.0, 2.0])
        set_precision(pipe.transformer, "fp8", torch.float32)
        with pytest.raises(InputError, match="stored as fp8"):
            pipe.fuse_lora()


class TestFingerprint:
    def test_a_saved_rollout_refuses_other_weights(
        self, base: dict[str, Tensor], pairs: Pairs, tmp_path: Path
    ) -> None:
        rollout = build_rollout(transformer=with_weights(base))
        rollout.step_chunk()
        path = tmp_path / "saved.safetensors"
        save_rollout(rollout, path)
        load_rollout(build_rollout(transformer=with_weights(base)), path)
        fused = with_weights(added(base, (pairs, 1.0)))
        with pytest.raises(StateError, match="other weights"):
            load_rollout(build_rollout(transformer=fused), path)

    def test_every_matrix_counts(self, base: dict[str, Tensor], pairs: Pairs) -> None:
        plain = fingerprint(with_weights(base))
        assert fingerprint(with_weights(base)) == plain
        seen = {plain}
        for name in pairs:
            # as little as a LoRA of rank one on one layer, and rounded to half precision
            changed = {name: (pairs[name][0][:1], pairs[name][1][:, :1])}
            seen.add(fingerprint(with_weights(added(base, (changed, 0.01))).bfloat16()))
        seen.add(fingerprint(with_weights(base).bfloat16()))
        assert len(seen) == 2 + len(pairs)
        vector = dict(base)
        vector["blocks.1.attn1.norm_q.weight"] = base["blocks.1.attn1.norm_q.weight"] * 1.001
        assert fingerprint(with_weights(vector)) != plain

    def test_adapters_count_while_they_act(
        self, base: dict[str, Tensor], pairs: Pairs, others: Pairs
    ) -> None:
        plain = fingerprint(with_weights(base))
        model = with_weights(base)
        load_adapter(model, peft_file(pairs), "style")
        style = fingerprint(model)
        model.set_adapters("style", 0.5)
        half = fingerprint(model)
        load_adapter(model, peft_file(others), "motion")
        motion = fingerprint(model)
        assert len({plain, style, half, motion}) == 4
        model.set_adapters("style")
        assert fingerprint(model) == style
        model.disable_adapters()
        assert fingerprint(model) == plain
        model.enable_adapters()
        model.fuse_lora()
        fused = fingerprint(model)
        assert fused not in (plain, style)
        model.unload_lora()
        assert fingerprint(model) == fused

    def test_weights_in_eight_bits(self, base: dict[str, Tensor]) -> None:
        found = {fingerprint(with_weights(base))}
        for precision in ("fp8", "int8"):
            model = with_weights(base)
            set_precision(model, precision, torch.float32)  # type: ignore[arg-type]
            found.add(fingerprint(model))
        assert len(found) == 3
