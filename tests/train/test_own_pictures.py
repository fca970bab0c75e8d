"""A folder of 200 labelled pictures, by the commands of docs/data.md: it is learned, and by looking."""

import random

from tests.train import world
from train.measure.results import Evaluation


def test_a_folder_of_labelled_pictures_trains_and_evaluates(tmp_path):
    home, draw = world.make(tmp_path / "world"), random.Random(0)
    for name, color in world.COLORS.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(50):
            shade = tuple(min(255, max(0, c + draw.randrange(-40, 40))) for c in color)
            (tmp_path / "pictures" / name / f"{number}.png").write_bytes(world.picture(shade))
    words = ["source=folder", "name=mine", f"source.path={tmp_path}/pictures", f"root={home}/data"]
    done = world.train([*words, "test_fraction=0.2"], module="data_prep")
    assert done.returncode == 0, done.stderr
    runs = {stage: tmp_path / stage for stage in ("pretrain", "finetune")}
    for stage, run in runs.items():
        given = ["data.name=mine", f"recipe=own/{stage}", f"stage={stage}", "stage.steps=60", "data.batch_size=32"]
        started = [f"init_from={runs['pretrain']}"] if stage == "finetune" else []
        words = world.overrides(home, run, *given, *started)
        refused = world.train(words)  # the test world's own splits stand in them
        assert refused.returncode == 2 and "data.train is given, and data.name=mine" in refused.stderr
        done = world.train([word for word in words if not word.startswith(("data.train", "data.val", "data.test"))])
        assert done.returncode == 0, done.stderr
    found = {}
    for images in ("real", "shuffled"):
        done = world.train([f"run={runs['finetune']}", f"images={images}"], module="train.evaluate")
        assert done.returncode == 0, done.stderr
        found[images] = Evaluation.read(runs["finetune"] / "evaluation" / f"test-{images}.json")
    right, wrong = (found[images].accuracy["overall"] for images in ("real", "shuffled"))
    assert right.count >= 40 and right.low > wrong.high, (right, wrong)
    assert wrong.percent < 50 and found["real"].blind["overall"].percent <= 25
