"""Stories in sequence: the file, the prompts of three contexts, and what is refused."""

import pytest

from mmfast.eval import vist


def sentence(story, place, picture, **other):
    return [{"story_id": story, "worker_arranged_photo_order": place, "photo_flickr_id": picture, "text": f"{story} {place} .", **other}]


def file(*stories):
    """Official annotations of stories by id and pictures."""
    notes = [
        sentence(story, place, str(picture), original_text="Otherwise.") for story, row in stories for place, picture in enumerate(row)
    ]
    return {"images": [{"id": "1"}], "annotations": notes, "info": {}, "type": "sis"}


def test_stories_and_prompts():
    raw = file(("45530", (11, 12, 13, 14, 15)), ("45531", (11, 12, 13, 14, 99)))
    raw["annotations"][:2] = raw["annotations"][1::-1]  # a place is told by its number
    assert vist.is_vist(raw)
    first, second = vist.stories(raw)
    assert first == vist.Story("45530", tuple(f"45530 {i} ." for i in range(5)), (11, 12, 13, 14, 15))
    assert second.pictures[-1] == 99
    assert vist.prompt(first, "1_caption", "[RET]") == (["45530 4 .[RET]"], [])
    assert vist.prompt(first, "5_captions", "[RET]") == ([*first.captions[:4], "45530 4 .[RET]"], [])
    parts, shown = vist.prompt(first, "5_captions_4_images", "[RET]")
    assert parts == ["45530 0 .", None, "45530 1 .", None, "45530 2 .", None, "45530 3 .", None, "45530 4 .[RET]"]
    assert shown == [11, 12, 13, 14]
    assert list(vist.CONTEXTS) == ["1_caption", "5_captions", "5_captions_4_images"]
    del raw["annotations"][0][0]["text"]
    assert vist.stories(raw)[0].captions[1] == "Otherwise."


def test_other_files():
    coco = {"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}
    assert not any(map(vist.is_vist, (coco, [], {"annotations": []}, None, {"images": [], "annotations": []})))


@pytest.mark.parametrize(
    ("change", "sentence_of"),
    [
        (lambda n: n.pop(2), r"story 7 has the places \[0, 1, 3, 4\], expected 0 to 4"),
        (lambda n: n.append(n[1]), "story 7 has two sentences of place 1"),
        (lambda n: n[3][0].pop("photo_flickr_id"), "annotation 3 lacks 'photo_flickr_id'"),
        (lambda n: n[3][0].update(photo_flickr_id="x"), r"annotation 3 has a wrong number \(invalid literal"),
        (lambda n: n[0][0].update(text=" "), r"annotation 0 \(story 7\) has no text"),
        (lambda n: n[4].append(n[0][0]), "annotation 4: expected a list of one object"),
    ],
)
def test_what_is_refused(change, sentence_of):
    raw = file(("7", (1, 2, 3, 4, 5)))
    change(raw["annotations"])
    with pytest.raises(ValueError, match=f"val.json: {sentence_of}"):
        vist.stories(raw, "val.json")
