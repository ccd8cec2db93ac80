"""What the tests of single studies share."""

import pytest

from fl_privacy.studies import conduct, load_study


@pytest.fixture(scope="module")
def conducted(tmp_path_factory):
    """Runs a study with some settings; returns its rows and the folder, in which a figure was drawn."""

    def run(name, **settings):
        folder = tmp_path_factory.mktemp(name)
        study = load_study(name)
        rows = conduct(study, study.settings(**settings), folder)
        assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
        return rows, folder

    return run
