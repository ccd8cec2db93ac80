"""What the tests of single studies share."""

import pytest
from matplotlib.image import imread

from fl_privacy.studies import conduct, load_study


@pytest.fixture(scope="module")
def conducted(tmp_path_factory):
    """Runs a study with some settings; returns its rows and the folder, in which a figure was drawn.

    What the figure shows is tested in test_figures.py.
    """

    def run(name, **settings):
        folder = tmp_path_factory.mktemp(name)
        study = load_study(name)
        rows = conduct(study, study.settings(**settings), folder)
        picture = imread(folder / "figure.png")
        assert picture.shape[:2] == (round(130 * study.figure_size[1]), round(130 * study.figure_size[0]))
        assert picture.std() > 0.05
        return rows, folder

    return run
