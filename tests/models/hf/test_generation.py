"""The tokens that end an answer by ``generation_config.json``."""

import json
from pathlib import Path

import pytest

from jrlhf.models.hf.generation import generation_eos


def folder_with(folder: Path, eos: object, *, vocab_size: int = 10) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "top_p": 0.9}))
    return folder


@pytest.mark.parametrize(("eos", "ids"), [(3, (3,)), ([9, 2, 9], (9, 2)), (None, ()), ([], ()), (0, (0,))])
def test_ids_of_one_eos_or_several(tmp_path: Path, eos: object, ids: tuple[int, ...]) -> None:
    assert generation_eos(folder_with(tmp_path, eos)) == ids


def test_a_folder_without_the_file_names_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert generation_eos(str(tmp_path)) == ()


@pytest.mark.parametrize("eos", ["</s>", True, 1.0, [1, None], [[1]], -1, {"id": 1}])
def test_what_is_no_id_is_refused(tmp_path: Path, eos: object) -> None:
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id: expected a token id or a list"):
        generation_eos(folder_with(tmp_path, eos))


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eos_token_id: 10 is not an id of the model's 10 tokens"):
        generation_eos(folder_with(tmp_path, [1, 10]))


def test_an_adapter_has_its_base_s(tmp_path: Path) -> None:
    base, adapter = folder_with(tmp_path / "base", [4, 5]), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert generation_eos(adapter) == (4, 5)
