from longreach.verbs.extend import ExtendConfig


def test_models_are_measured_as_they_are_and_scaled():
    assert ExtendConfig(models=("a",)).scalings == ("none", "linear", "ntk")
