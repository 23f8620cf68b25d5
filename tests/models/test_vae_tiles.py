"""Tiles stream, blend to the whole where tiles see enough, and keep their own caches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from tests.tiny import CHANNELS, build_vae, noise, relative_l2
from vidkv.errors import InputError, StateError
from vidkv.models.registry import MODELS, weights_folder
from vidkv.models.vae import StreamingDecoder
from vidkv.models.vae_tiles import TiledDecoder, Tiling

KINDS: dict[str, dict[str, Any]] = {
    "bounce": {},
    "residual, Wan 2.2": {"is_residual": True, "decoder_base_dim": 4},
}
GRID = (2, 7, 9)
TILINGS = [
    Tiling(4, 4),
    Tiling(4, 4, 2),
    Tiling(3, 5, 0),
    Tiling(5, None, 1),
    Tiling(None, 2),
    Tiling(4, 6, sliced=True),
    Tiling(sliced=True),
    Tiling(20, 20),
]


@pytest.fixture(params=KINDS)
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    return build_vae(**KINDS[request.param])


def latents_for(frames: int) -> Tensor:
    return noise(GRID[0], frames, CHANNELS, *GRID[1:])


def tiled(vae: AutoencoderKLWan, tiling: Tiling) -> TiledDecoder:
    return TiledDecoder(lambda: StreamingDecoder(vae), tiling)


def without_neighbours(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The same network with every pixel on its own: a tile then knows all that its pixels need."""
    for module in vae.decoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.kernel_size[-1] == 3:
            kept = module.weight[..., 1:2, 1:2].clone()
            module.weight.data.zero_()
            module.weight.data[..., 1:2, 1:2] = kept
    for attention in vae.decoder.mid_block.attentions:
        attention.proj.weight.data.zero_()
    return vae


class TestBlending:
    @pytest.mark.parametrize("tiling", TILINGS, ids=str)
    def test_equal_where_tiles_see_enough(self, vae: AutoencoderKLWan, tiling: Tiling) -> None:
        """Every pixel once, in its place, whatever the cut; streamed in uneven chunks."""
        vae, latents = without_neighbours(vae), latents_for(5)
        wanted = StreamingDecoder(vae).decode(latents)
        decoder = tiled(vae, tiling)
        found = torch.cat([decoder.decode(part) for part in latents.split([1, 3, 1], 1)], 2)
        assert float(wanted.std()) > 0.1
        assert relative_l2(found, wanted) <= 1e-5

    def test_a_cut_in_the_batch_alone_is_exact(self, vae: AutoencoderKLWan) -> None:
        latents = latents_for(3)
        found = tiled(vae, Tiling(sliced=True)).decode(latents)
        wanted = torch.cat([StreamingDecoder(vae).decode(latents[i : i + 1]) for i in range(GRID[0])])
        assert torch.equal(found, wanted)

    def test_one_tile_is_the_untiled_decoder(self, vae: AutoencoderKLWan) -> None:
        latents = latents_for(3)
        assert torch.equal(tiled(vae, Tiling(7, 9)).feed(latents), StreamingDecoder(vae).feed(latents))

    def test_a_tile_is_right_far_from_its_edges(self) -> None:
        """Without attention a decoder sees so far: 9 latents at its coarsest level, 4 at the finer ones."""
        vae = build_vae()
        vae.decoder.mid_block.attentions[0].proj.weight.data.zero_()
        latents = noise(1, 3, CHANNELS, 2, 64)
        wanted = StreamingDecoder(vae).decode(latents)
        found = tiled(vae, Tiling(None, 40, 16)).decode(latents)
        # tiles of 40 share the columns from 24 to 40
        alone = slice(0, 24 * wanted.shape[-1] // 64)
        assert relative_l2(found[..., alone], wanted[..., alone]) <= 1e-5
        assert relative_l2(found, wanted) > 1e-3

    def test_a_trained_network_hardly_shows_its_tiles(self) -> None:
        """The embedded world's: quarters of a larger picture, on random latents; more overlap, less error."""
        folder = weights_folder(MODELS["bounce"])
        assert folder is not None
        vae = AutoencoderKLWan.from_pretrained(folder / "vae").eval().requires_grad_(False)
        latents = noise(1, 2, vae.config.z_dim, 24, 24)
        wanted = StreamingDecoder(vae).decode(latents).clamp(-1, 1)
        errors = [
            relative_l2(tiled(vae, Tiling(16, 16, overlap)).decode(latents).clamp(-1, 1), wanted)
            for overlap in (0, 4, 8)
        ]
        assert errors[2] < errors[1] < errors[0]
        assert errors[2] <= 0.04, errors


class TestCut:
    @pytest.mark.parametrize("tiling", TILINGS, ids=str)
    def test_covers_the_grid_within_bounds(self, tiling: Tiling) -> None:
        batch, height, width = GRID
        count = torch.zeros(GRID, dtype=torch.int64)
        for tile in tiling.cut(GRID):
            count[slice(*tile.batch), slice(*tile.rows), slice(*tile.columns)] += 1
            assert tile.grid[0] == (1 if tiling.sliced else batch)
            assert tile.grid[1] <= min(height, tiling.rows or height)
            assert tile.grid[2] <= min(width, tiling.columns or width)
        assert int(count.min()) == 1

    @pytest.mark.parametrize("length", range(5, 40))
    def test_neighbours_overlap_as_asked(self, length: int) -> None:
        for size, overlap in ((4, 0), (4, 1), (4, 2), (5, 2), (9, 3)):
            spans = [tile.columns for tile in Tiling(None, size, overlap).cut((1, 1, length))]
            assert spans[0][0] == 0 and spans[-1][1] == length
            assert all(a[1] - b[0] >= overlap for a, b in pairwise(spans))
            assert len({end - start for start, end in spans}) == 1

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"rows": 1, "columns": 4}, "a tile of 1 x 4 latents"),
            ({"rows": 4, "columns": 6, "overlap": 3}, "overlap=3 .* half a tile"),
            ({"rows": 4, "overlap": -1}, "overlap=-1"),
            ({"overlap": 1}, "overlap=1"),
        ],
    )
    def test_settings_that_contradict_themselves(self, settings: dict[str, int], words: str) -> None:
        with pytest.raises(InputError, match=words):
            Tiling(**settings)


class TestState:
    @pytest.mark.parametrize("fed", [0, 1, 4])
    @pytest.mark.parametrize("tiling", [Tiling(4, 6), Tiling(4, 6, sliced=True, offload=True)], ids=str)
    def test_restore_and_copy_go_on_bit_for_bit(
        self, vae: AutoencoderKLWan, tiling: Tiling, fed: int
    ) -> None:
        from safetensors.torch import load, save

        latents = latents_for(6)
        source = tiled(vae, tiling)
        if fed:
            source.feed(latents[:, :fed])
        saved = save({name: tensor.contiguous() for name, tensor in source.state().items()})
        copy, restored = source.copy(), tiled(vae, tiling)
        restored.feed(latents[:, 3:5])
        restored.restore(load(saved), GRID)
        other = copy.feed(-latents[:, fed:])
        wanted = source.feed(latents[:, fed:])
        assert torch.equal(restored.feed(latents[:, fed:]), wanted)
        assert not torch.equal(other, wanted)

    @pytest.mark.parametrize(
        "damage",
        [
            "no grid",
            "grid",
            "missing",
            "surplus",
            "tile",
            "uneven",
            "tile of another grid",
            "no tiles",
            "other tiling",
        ],
    )
    def test_a_damaged_state_changes_nothing(self, damage: str) -> None:
        vae, latents = build_vae(), latents_for(6)
        decoder, undisturbed = tiled(vae, Tiling(4, 6)), tiled(vae, Tiling(4, 6))
        decoder.feed(latents[:, :3])
        undisturbed.feed(latents[:, :3])
        state, other = decoder.state(), StreamingDecoder(vae)
        other.feed(noise(2, 3, CHANNELS, 3, 3))
        changes: dict[str, Callable[[], object]] = {
            "no grid": lambda: state.pop("grid"),
            "grid": lambda: state.update(grid=torch.tensor([2, 9, 7])),
            "missing": lambda: state.pop("1.feature.3"),
            "surplus": lambda: state.update({"1.feature.999": state["1.feature.3"]}),
            "tile": lambda: state.update({"99.feature.3": state["1.feature.3"]}),
            "uneven": lambda: state.update({"1.fed_frames": torch.tensor(4)}),
            "tile of another grid": lambda: state.update(
                {f"1.{name}": tensor for name, tensor in other.state().items()}
            ),
            "no tiles": lambda: state.update(grid=torch.tensor([2, 0, 7])),
            "other tiling": lambda: state.update(tiled_state(vae, Tiling(3, 3))),
        }
        changes[damage]()
        with pytest.raises(StateError, match=r"grid|feature|fed_frames"):
            decoder.restore(state)
        assert torch.equal(decoder.feed(latents[:, 3:]), undisturbed.feed(latents[:, 3:]))

    def test_a_state_of_another_grid(self) -> None:
        decoder = tiled(build_vae(), Tiling(4, 6))
        decoder.feed(latents_for(1))
        with pytest.raises(StateError, match=r"grid is \(2, 7, 9\), this rollout needs \(2, 9, 7\)"):
            decoder.restore(decoder.state(), (2, 9, 7))

    def test_reset_takes_another_grid(self) -> None:
        decoder = tiled(build_vae(), Tiling(4, 6))
        first = decoder.feed(latents_for(2))
        with pytest.raises(InputError, match=r"\(1, 5, 5\) follow \(2, 7, 9\)"):
            decoder.feed(noise(1, 1, CHANNELS, 5, 5))
        decoder.reset()
        assert decoder.feed(noise(1, 1, CHANNELS, 5, 5)).shape[0] == 1
        decoder.reset()
        assert torch.equal(decoder.feed(latents_for(2)), first)
        assert decoder.flush().shape == (0, 0, 0, 3)

    @pytest.mark.parametrize("shape", [(2, 0, CHANNELS, 7, 9), (2, CHANNELS, 7, 9)])
    def test_wrong_latents(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match="latents are"):
            tiled(build_vae(), Tiling(4, 4)).feed(torch.zeros(shape))


def tiled_state(vae: AutoencoderKLWan, tiling: Tiling) -> dict[str, Tensor]:
    decoder = tiled(vae, tiling)
    decoder.feed(latents_for(1))
    return decoder.state()


def test_never_looks_at_a_value(vae: AutoencoderKLWan) -> None:
    """Tensors without data pass: nothing is copied to the host, nothing branches on a number."""
    decoder = tiled(vae.to("meta"), Tiling(4, 4))
    for frames in (1, 3):
        assert decoder.feed(latents_for(frames).to("meta")).is_meta


@pytest.mark.gpu
def test_offload_keeps_one_tile_on_the_device(vae: AutoencoderKLWan) -> None:
    """The frames are those of tiles that stay; between calls their caches are in pinned host memory."""
    vae, latents = vae.to("cuda"), latents_for(5).to("cuda")
    stays, moves = tiled(vae, Tiling(4, 6)), tiled(vae, Tiling(4, 6, offload=True))
    for part in latents.split([1, 3, 1], 1):
        assert torch.equal(moves.feed(part), stays.feed(part))
    kept = [t for name, t in moves.state().items() if ".feature." in name]
    assert all(t.is_pinned() for t in kept)
    copy = moves.copy()
    assert torch.equal(copy.feed(latents), moves.feed(latents))
