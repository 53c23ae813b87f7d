"""What is published replaces what was there, whatever either is, and leaves nothing behind."""

import pytest

from lit_interns1.checkpoints import partial_path, publish, remove_published


def write(path, text, folder):
    if folder:
        path.mkdir()
        (path / "content").write_text(text)
    else:
        path.write_text(text)


def content(path):
    return (path / "content" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("kinds", [(True,) * 4, (False, False, False), (False, True, False, True)])
def test_the_newest_is_found_under_its_name(tmp_path, kinds):
    final = tmp_path / "last.ckpt"
    for number, folder in enumerate(kinds):
        write(partial_path(final), str(number), folder)
        publish(partial_path(final), final)
        assert content(final) == str(number)
        assert final.is_dir() == folder
        assert not partial_path(final).exists()
        assert len(list(tmp_path.iterdir())) == (2 if folder else 1)  # a folder, and the link to it
    remove_published(final)
    assert list(tmp_path.iterdir()) == []
    remove_published(final)


def test_a_folder_of_another_origin_is_kept(tmp_path):
    final = tmp_path / "last.ckpt"
    write(final, "mine", True)
    write(partial_path(final), "new", True)
    publish(partial_path(final), final)
    assert content(final) == "new"
    assert content(tmp_path / "last.ckpt.before") == "mine"


def test_remains_of_an_interrupted_publication_do_not_matter(tmp_path):
    final = tmp_path / "last.ckpt"
    for number in range(3):
        write(partial_path(final), str(number), True)
        publish(partial_path(final), final)
        for leftover in (".last.ckpt.a", ".last.ckpt.b"):
            if not (tmp_path / leftover).exists():
                write(tmp_path / leftover, "half of an old one", True)
        (tmp_path / ".last.ckpt.link").symlink_to("nowhere")
        assert content(final) == str(number)


def test_removing_a_link_of_the_user_leaves_what_it_leads_to(tmp_path):
    write(tmp_path / "elsewhere", "mine", True)
    (tmp_path / "last.ckpt").symlink_to("elsewhere")
    remove_published(tmp_path / "last.ckpt")
    assert content(tmp_path / "elsewhere") == "mine"
    assert not (tmp_path / "last.ckpt").exists()
