# SPDX-License-Identifier: Apache-2.0
"""Latents as other programs write them, and texts in the encodings people have."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from pidecode import Latent
from pidecode.cli.app import cli
from pidecode.cli.weights import describe
from pidecode.errors import FileError, LatentError
from pidecode.latents.storage import count_latents
from pidecode.units import decode_text

VALUES = torch.randn(1, 128, 4, 6, generator=torch.Generator().manual_seed(0)) * 0.7


def comfy(path: Path, tensor: torch.Tensor) -> Path:
    save_file({"latent_tensor": tensor, "latent_format_version_0": torch.tensor([])}, path, {"prompt": "{}"})
    return path


def test_a_latent_of_comfyui_for_flux2_is_normalized_already(tmp_path: Path) -> None:
    path = comfy(tmp_path / "a.latent", VALUES)
    latent = Latent.load(path)
    assert latent.space == "flux2"
    torch.testing.assert_close(latent.tensor, VALUES)
    assert Latent.load(path.read_bytes()).space == "flux2"
    told = CliRunner().invoke(cli, ["info", str(path)]).stdout
    assert "latent" in told
    assert "ComfyUI" in told


def test_a_latent_of_comfyui_is_raw_for_the_others(tmp_path: Path) -> None:
    raw = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)) * 2.7
    path = comfy(tmp_path / "a.latent", raw)
    with pytest.raises(LatentError, match=r"Latent\.load\(path, space="):
        Latent.load(path)
    torch.testing.assert_close(Latent.load(path, space="flux").tensor, Latent.from_raw(raw, "flux").tensor)
    save_file({"latent_tensor": raw * 0.18215}, tmp_path / "old.latent")  # without the mark of its version
    torch.testing.assert_close(
        Latent.load(tmp_path / "old.latent", space="flux").tensor, Latent.from_raw(raw, "flux").tensor
    )


def test_arrays_and_tensors_saved_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VALUES.numpy())
    torch.save(VALUES, tmp_path / "a.pt")
    torch.save({"latents": VALUES, "noise_mask": VALUES[:, :1]}, tmp_path / "b.pt")
    torch.save(VALUES, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.npy", "a.pt", "b.pt", "old.pt"):
        torch.testing.assert_close(Latent.load(tmp_path / name, space="flux2").tensor, VALUES)
        assert count_latents(tmp_path / name) == 1
    for name in ("a.npy", "a.pt"):
        told = CliRunner().invoke(cli, ["info", str(tmp_path / name), "--json"]).stdout
        assert '"latent"' in told
    torch.save(VALUES.repeat(3, 1, 1, 1), tmp_path / "three.pt")
    assert count_latents(tmp_path / "three.pt") == 3


def test_code_in_a_pickle_never_runs(tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"latents": Command()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Command(), protocol=2))
    np.save(tmp_path / "c.npy", np.array([Command()], dtype=object), allow_pickle=True)
    for name in ("a.pt", "b.pt", "c.npy"):
        with pytest.raises(FileError):
            Latent.load(tmp_path / name, space="flux2")
    assert not (tmp_path / "ran").exists()


def test_a_tensor_that_repeats_its_values_takes_no_memory(tmp_path: Path) -> None:
    torch.save(torch.zeros(1).expand(1, 128, 40_000, 40_000), tmp_path / "a.pt")
    for read in (count_latents, Latent.load):
        with pytest.raises(FileError, match="claims 204,800,000,000 values and stores fewer"):
            read(tmp_path / "a.pt")


@pytest.mark.parametrize("shape", [(128, 4, 6), (1, 128, 1, 4, 6), (128, 1, 4, 6)])
def test_a_missing_batch_axis_and_one_frame(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_file({"latent": VALUES.reshape(shape)}, tmp_path / "a.safetensors")
    torch.testing.assert_close(Latent.load(tmp_path / "a.safetensors", space="flux2").tensor, VALUES)


def test_a_video_is_refused_with_its_frames(tmp_path: Path) -> None:
    save_file({"latent": torch.zeros(1, 16, 5, 4, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(LatentError, match="5 frames"):
        Latent.load(tmp_path / "a.safetensors", space="qwenimage")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_in_any_unicode_encoding(encoding: str) -> None:
    assert decode_text("eine schöne 猫".encode(encoding), "a.txt") == "eine schöne 猫"


def test_legacy_encodings_are_refused_by_name() -> None:
    with pytest.raises(FileError, match=r"a\.txt is not Unicode.*UTF-8"):
        decode_text("schön".encode("latin-1"), "a.txt")


def test_every_spelling_of_a_tensor(tmp_path: Path) -> None:
    values = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    array = values.numpy()
    np.save(tmp_path / "big.npy", array.astype(">f4"))
    np.savez(tmp_path / "one.npz", array)
    np.savez_compressed(tmp_path / "named.npz", latents=array, seed=np.array(3))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(array))
    torch.save(values.to(torch.float8_e4m3fn), tmp_path / "eight.pt")
    save_file({"latent": values.to(torch.float8_e5m2)}, tmp_path / "eight.safetensors")
    save_file({"sample": values}, tmp_path / "only.safetensors")
    torch.save({"latents": values}, tmp_path / "table.pt")
    torch.save(values[:, None], tmp_path / "frames_first.pt")
    torch.save(values.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), tmp_path / "strided.pt")
    for path in sorted(tmp_path.iterdir()):
        tensor = Latent.load(path, space="flux").tensor
        assert torch.allclose(tensor, values, atol=0.5 if "eight" in path.name else 1e-6), path.name
        assert describe(path)["what"] == "latent", path.name
    np.savez(tmp_path / "two.npz", a=array, b=array)
    with pytest.raises(LatentError, match="must hold one tensor, or one named 'latent'; it holds 2: a, b"):
        Latent.load(tmp_path / "two.npz", space="flux")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "one.npz").read_bytes()[:200])
    with pytest.raises(FileError, match="damaged NumPy file"):
        Latent.load(tmp_path / "cut.npz", space="flux")
    with pytest.raises(LatentError, match="packed tokens"):
        Latent(torch.zeros(1, 24, 128), "flux")


@pytest.mark.parametrize("shape", ["(10000000, 10000000, 10, 10)", f"({'9' * 4000},)", "(-1, 128)", "(2 ** 9,)"])
def test_a_numpy_file_whose_shape_lies_is_refused(shape: str) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    with pytest.raises(FileError, match="damaged NumPy file"):
        Latent.load(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64), space="flux")


@pytest.mark.parametrize(("offset", "value"), [(8, 1), (10, 77), (42, 255)])  # encrypted, an unknown method, elsewhere
def test_a_numpy_archive_that_cannot_be_unpacked_is_refused(offset: int, value: int, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", latent=VALUES.numpy())
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.index(b"PK\1\2") + offset] = value
    with pytest.raises(FileError, match="damaged NumPy file"):
        Latent.load(bytes(data), space="flux2")
