from dataclasses import replace

from sample_records import at_seed

from longreach.report.subjects.skipped import sections, skipped_grid


def test_skipped_cells_of_one_reason_stand_together(demo):
    (row,) = skipped_grid(demo).rows
    assert row == ("its table holds 128 positions", "learned", "128", "nonoverlapping at 256, 512, 1,024, 2,048")


def test_what_was_skipped_for_one_reason_is_one_row_as_long_as_it_is_the_same(empty, skipped):
    def offsets(method, train_length=128):
        entry = skipped(method, 64, "too short", train_length)
        return replace(entry, task="offsets", stride=None, protocol=None)

    entries = []
    for method, train_length in (("a", 128), ("b", 128), ("a", 256), ("b", 256), ("c", 128)):
        entries += [skipped(method, n, "too short", train_length) for n in (512, 64)]
        entries.append(replace(entries[-1], stride=1, protocol="cached"))
    entries += [offsets("a"), offsets("b"), offsets("a", 256), offsets("b", 256), skipped("c", 128, "out of memory")]
    assert skipped_grid(empty.add(*entries)).rows == (
        ("too short", "a, b", "128, 256", "nonoverlapping at 64, 512; cached, offsets at 64"),
        ("too short", "c", "128", "nonoverlapping at 64, 512; cached at 64"),
        ("out of memory", "c", "128", "nonoverlapping at 128"),
    )


def test_seeds_are_named_where_the_method_has_others(empty, record, skipped):
    entries = [at_seed(record("alibi", 128, 9.0), seed) for seed in (0, 1, 2)]
    entries += [at_seed(skipped("alibi", 256, "loss is nan"), seed) for seed in (1, 2)]
    entries += [at_seed(skipped("learned", 256, "its table ends"), seed) for seed in (0, 1, 2)]
    assert skipped_grid(empty.add(*entries)).rows == (
        ("loss is nan", "alibi (seeds 1 and 2)", "128", "nonoverlapping at 256"),
        ("its table ends", "learned", "128", "nonoverlapping at 256"),
    )


def test_models_that_work_broke_off_at_are_named_with_the_reason(empty, record, skipped):
    broken = replace(at_seed(skipped("rotary", 128, "loss is nan: lower the rate."), 1), failed=True)
    results = empty.add(record("rotary", 128, 9.0), broken, skipped("learned", 256, "its table ends"))
    (section,) = sections(results)
    (finding,) = section.findings
    assert finding.sentence == "Work on rotary trained at 128, seed 1 broke off: loss is nan: lower the rate."
    assert "tries it again" in finding.details
    assert [row[1] for row in section.tables[0].rows] == ["rotary (seed 1)", "learned"]
