"""The made-up set: any sample at any time, the same."""

import io

from PIL import Image

from data_prep.prepare import prepare
from data_prep.sources.synthetic import Synthetic
from data_prep.store.split import Split


def test_samples_depend_on_seed_and_number_alone(tmp_path):
    for name, source in {"a": Synthetic(300, 100), "b": Synthetic(300, 64), "c": Synthetic(300, 100, seed=1)}.items():
        manifest = prepare(source, tmp_path / name).manifests["train"]
        assert (manifest.samples, manifest.unique_images) == (300, 300)
    a, b, c = (list(Split(tmp_path / name / "train")) for name in "abc")
    assert a == b and not any(one.images == other.images for one, other in zip(a, c, strict=True))
    lengths = {len(sample.conversations[0][1]["content"].split()) for sample in a}
    assert min(lengths) == 4 and max(lengths) == 40
    assert Image.open(io.BytesIO(a[7].images[0])).size == (16, 16)
