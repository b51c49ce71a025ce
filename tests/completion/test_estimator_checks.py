from sklearn.utils.estimator_checks import parametrize_with_checks

from rankwise.completion import DeepMatrixCompletion


@parametrize_with_checks([DeepMatrixCompletion()])
def test_scikit_learn_check(estimator, check):
    check(estimator)
