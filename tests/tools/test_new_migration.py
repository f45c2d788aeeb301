import shutil

from darkroom.settings import HOME
from tools.new_migration import create_revision


def test_a_new_migration_has_the_next_number_and_follows_the_last(tmp_path):
    folder = tmp_path / "migrations"
    shutil.copytree(HOME / "migrations", folder)
    last = max(path.name[:4] for path in (folder / "versions").glob("*.py"))

    path = create_revision("add a color to jobs", folder)

    assert path.name == f"{int(last) + 1:04d}_add_a_color_to_jobs.py"
    assert f'down_revision = "{last}"' in path.read_text().replace("'", '"')
