"""A model folder goes to its place tensor by tensor, in the dtypes that its class asks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn
from transformers import UMT5EncoderModel

from tests.models.checkpoints import stock_files
from vidkv.errors import CheckpointError
from vidkv.models.checkpoints.load import load_model
from vidkv.models.wan import CausalWanTransformer3DModel

BUILDERS: dict[type[nn.Module], str] = {
    CausalWanTransformer3DModel: "transformer",
    AutoencoderKLWan: "vae",
    UMT5EncoderModel: "text_encoder",
}


@pytest.fixture(params=[False, True], ids=["one file", "shards"])
def sharded(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
class TestAgainstTheLibraries:
    def test_values_and_dtypes_are_those_of_from_pretrained(
        self, tmp_path: Path, build: type[nn.Module], dtype: torch.dtype, sharded: bool
    ) -> None:
        model = getattr(stock_files, BUILDERS[build])()
        model.save_pretrained(tmp_path, max_shard_size="60KB" if sharded else "1GB")
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is sharded
        option = "torch_dtype" if hasattr(build, "from_config") else "dtype"
        wanted = build.from_pretrained(tmp_path, **{option: dtype}).state_dict()  # type: ignore[attr-defined]
        loaded = load_model(build, tmp_path, "cpu", dtype)
        found = loaded.state_dict()
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


class TestWhole:
    def test_tied_embeddings_are_one_tensor_and_the_encoder_runs(self, tmp_path: Path) -> None:
        model = stock_files.text_encoder()
        model.save_pretrained(tmp_path)
        loaded = load_model(UMT5EncoderModel, tmp_path, "cpu", torch.float32)
        assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
        ids = torch.arange(12)[None]
        with torch.no_grad():
            assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        stock_files.transformer().save_pretrained(tmp_path, max_shard_size="60KB")
        gone = sorted(tmp_path.glob("*.safetensors"))[1]
        gone.unlink()
        with pytest.raises(CheckpointError, match=gone.name):
            load_model(CausalWanTransformer3DModel, tmp_path, "cpu", torch.float32)

    @pytest.mark.parametrize("place", ["../x.safetensors", "/x.safetensors", "a/b.safetensors"])
    def test_an_index_may_not_lead_elsewhere(self, tmp_path: Path, place: str) -> None:
        stock_files.transformer().save_pretrained(tmp_path, max_shard_size="60KB")
        path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["proj_out.bias"] = place
        path.write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="not beside it"):
            load_model(CausalWanTransformer3DModel, tmp_path, "cpu", torch.float32)


PROGRAM = """
import json, sys, threading, time
from pathlib import Path
import torch
from safetensors import safe_open
from vidkv.models.checkpoints.load import load_model
from vidkv.models.wan import CausalWanTransformer3DModel as Model

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.0005)

folder = Path(sys.argv[1])
load_model(Model, Path(sys.argv[2]), "cpu", torch.bfloat16)
done, peak, before = threading.Event(), [0], resident()
thread = threading.Thread(target=watch)
thread.start()
model = load_model(Model, folder, "cpu", torch.bfloat16)
done.set()
thread.join()
held = sum(p.nbytes for p in model.parameters())
print(json.dumps({"peak": peak[0] - before, "destination": held}))
"""


class TestMemory:
    def test_beyond_the_destination_is_one_shard(self, tmp_path: Path) -> None:
        config = {"num_attention_heads": 8, "ffn_dim": 4096, "text_dim": 64, "num_layers": 8}
        with torch.device("cpu"):
            model = CausalWanTransformer3DModel(**config)
        model.bfloat16().save_pretrained(tmp_path / "large", max_shard_size="60MB")
        del model
        stock_files.transformer().save_pretrained(tmp_path / "small")
        shards = [path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")]
        assert len(shards) >= 4 and sum(shards) > 200e6
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "large"), str(tmp_path / "small")],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
        )  # fmt: skip
        figures = json.loads(done.stdout.splitlines()[-1])
        assert figures["peak"] - figures["destination"] <= 1.2 * max(shards), (figures, max(shards))
