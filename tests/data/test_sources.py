import subprocess
import sys

import numpy as np
import pytest

from polyfed.core.errors import DataError
from polyfed.data import Raw, read

pd = pytest.importorskip("pandas")
X, Y = np.arange(8.0).reshape(4, 2), np.array([0, 1, 1, 0])
FRAME = pd.DataFrame({"age": [60.0, 50, np.nan, 70], "sex": ["m", "f", None, "f"], "who": [1, 1, 2, 3], "ill": Y > 0})


def test_arrays_when_given_as_a_pair_become_input_and_target():
    raw = read("va", (X.tolist(), Y[:, None]))
    assert raw.x.tolist() == X.tolist()
    assert raw.target.tolist() == Y.tolist()
    assert raw.columns == ("x",)


def test_several_inputs_come_as_a_dict_with_a_target_key_or_beside_y():
    for raw in (
        read("va", {"image": X, "age": Y, "y": Y}, target="y"),
        read("va", ({"image": X, "age": Y}, Y)),
    ):
        assert list(raw.inputs) == ["image", "age"]
        assert raw.target.tolist() == Y.tolist()


def test_a_frame_gives_up_target_groups_and_time_columns():
    raw = read("va", FRAME, target="ill", groups="who", time=[4, 3, 2, 1])
    assert raw.columns == ("age", "sex")
    assert raw.groups.tolist() == [1, 1, 2, 3]
    assert raw.time.tolist() == [4, 3, 2, 1]
    assert list(FRAME.columns) == ["age", "sex", "who", "ill"]
    taken = raw.take(np.array([3, 0]))
    assert taken.x["age"].tolist() == [70.0, 60.0]
    assert taken.target.tolist() == [False, False]
    assert list(taken.x.index) == [0, 1]


def test_several_targets_are_stacked():
    raw = read("va", FRAME, target=["who", "ill"])
    assert raw.target.shape == (4, 2)


def test_a_callable_is_called_and_may_return_a_callable():
    assert len(read("va", lambda: lambda: (X, Y))) == 4


def test_torch_datasets_and_loaders_are_read():
    torch = pytest.importorskip("torch")
    x, y = torch.tensor(X), torch.tensor(Y)

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            if i >= 4:
                raise IndexError
            return {"image": x[i], "age": y[i].item(), "y": str(Y[i])}

    pairs = torch.utils.data.TensorDataset(x, y)
    for data in (pairs, torch.utils.data.Subset(pairs, range(4)), torch.utils.data.DataLoader(pairs, 3, shuffle=True)):
        raw = read("va", data)
        assert raw.x.tolist() == X.tolist()
        assert raw.target.tolist() == Y.tolist()
    raw = read("va", Items(), target="y")
    assert list(raw.inputs) == ["image", "age"]
    assert raw.target.tolist() == ["0", "1", "1", "0"]


class FakeDataset:
    """What `read` asks of a tf.data.Dataset; TensorFlow itself takes seconds to import."""

    __module__ = "tensorflow.python.data.ops.dataset_ops"

    def __init__(self, items, shapes, count=4):
        self.items, self.count = items, count
        self.element_spec = tuple(type("Spec", (), {"shape": shape})() for shape in shapes)

    def cardinality(self):
        return self.count

    def as_numpy_iterator(self):
        return iter(self.items)

    def unbatch(self):
        return FakeDataset([(x, y) for xs, ys in self.items for x, y in zip(xs, ys, strict=True)], [(2,), ()])


def test_a_tensorflow_dataset_is_read_batched_or_not():
    plain = FakeDataset(list(zip(X, Y, strict=True)), [(2,), ()])
    batched = FakeDataset([(X[:3], Y[:3]), (X[3:], Y[3:])], [(None, 2), (None,)])
    for data in (plain, batched):
        raw = read("va", data)
        assert raw.x.tolist() == X.tolist()
        assert raw.target.tolist() == Y.tolist()
    with pytest.raises(DataError, match=r"va: .*infinite.*take\(n\)"):
        read("va", FakeDataset([], [(2,), ()], count=-1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: read("va", (X[:0], Y[:0])), "va: the data has no rows"),
        (lambda: read("va", (X, Y[:3])), "va: .*differ in their number of rows"),
        (lambda: read("va", ([[1], [1, 2]], [0, 1])), "va: x is ragged"),
        (lambda: read("va", FRAME), "va: the data has no target; write target= .*'age', 'sex', 'who', 'ill'"),
        (
            lambda: read("va", FRAME, target="sick"),
            "va: there is no target column 'sick'; .*'age', 'sex', 'who', 'ill'",
        ),
        (lambda: read("va", FRAME, target="ill", groups="x1"), "no groups column 'x1'"),
        (lambda: read("va", FRAME, target="ill", groups=[1]), "one value for each of the 4 rows"),
        (lambda: read("va", FRAME, target="age"), "va: the target is missing in 1 of 4 rows"),
        (lambda: read("va", FRAME, target="sex"), "va: the target is missing in 1 of 4 rows"),
        (lambda: read("va", (X, [0, 1, None, 1])), "va: the target is missing in 1 of 4 rows"),
        (lambda: read("va", (X, Y), target="y"), "both y and target="),
        (lambda: read("va", "rows.csv"), "va: data= of type str cannot be read; give"),
        (lambda: read("va", (X, 1.0)), "va: y is a float, not rows"),
        (lambda: read("va", (X * 1j, Y)), "dtype complex128"),
        (lambda: read("va", {"y": Y}, target="y"), "leaves no inputs"),
        (lambda: read("va", Raw({"x": X})), r"write data=\(x, y\)"),
    ],
)
def test_data_when_it_cannot_be_used_names_client_and_remedy(call, words):
    with pytest.raises(DataError, match=words):
        call()


def test_public_rows_need_no_target():
    assert read("public", X, labelled=False).target is None
    assert read("public", FRAME, labelled=False).columns == ("age", "sex", "who", "ill")


def test_reading_arrays_imports_no_framework():
    code = (
        "import sys, numpy as np; from polyfed import data as d; r = d.read('a', (np.ones((9, 2)), [0, 1, 1] * 3));"
        "d.prepare('a', r, d.divide('a', r, d.Split(0, 0)), d.problem_of({'a': r.target}));"
        "bad = {'pandas', 'sklearn', 'torch', 'tensorflow', 'keras'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
