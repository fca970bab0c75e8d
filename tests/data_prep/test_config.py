"""The files of conf/data_prep hold what differs from the dataclasses, and every key can be set all the same."""

from __future__ import annotations

from dataclasses import fields

import pytest
from omegaconf import OmegaConf

from common.errors import ConfigError
from data_prep import config as preparation
from data_prep.sources.folder import Folder
from data_prep.sources.llava import Llava


@pytest.mark.parametrize("name", preparation._names())
def test_a_file_says_only_what_differs_from_the_dataclass(name):
    said = OmegaConf.to_container(OmegaConf.load(preparation.CONF / "source" / f"{name}.yaml"))
    defaults = {f.name: f.default for f in fields(preparation.SOURCES[said.pop("kind")])}
    assert said.keys() <= defaults.keys()
    assert {key: value for key, value in said.items() if value in (defaults[key], "???")} == {}
    general = OmegaConf.to_container(OmegaConf.load(preparation.CONF / "config.yaml"))
    defaults = {f.name: f.default for f in fields(preparation.PrepareConfig)}
    assert {key: value for key, value in general.items() if key != "defaults" and value == defaults[key]} == {}


def test_a_key_that_no_file_names_can_be_set(tmp_path):
    words = ["source=folder", f"source.path={tmp_path}", "source.opening=''", "source.samples_per_shard=7"]
    config = preparation.load([*words, "options.on_error=drop", "val_fraction=0.2", "name=mine", f"root={tmp_path}"])
    assert config.source == Folder(tmp_path, opening="", samples_per_shard=7)
    assert (config.options.on_error, config.val_fraction, config.name) == ("drop", 0.2, "mine")
    config = preparation.load(["source=llava_pretrain", "source.label=null", "cache_dir=/c"])
    assert isinstance(config.source, Llava) and config.source.captions and config.source.label is None
    assert (config.root, str(config.source.images)) == ("/c/data", "/c/data_raw/llava_pretrain/images")
    assert config.name == "llava_pretrain"
    with pytest.raises(ConfigError, match=r"`source\.pth`; did you mean `source\.path`"):
        preparation.load(["source=folder", "source.pth=x"])
    with pytest.raises(ConfigError, match=r"`source\.path` has no value; set it on the command line"):
        preparation.load(["source=folder"])
