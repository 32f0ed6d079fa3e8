"""PA, PI and evaluate with the embedded pair on a few easy-VQA images; the fixture `easy_run` holds what they write."""

import json

from conftest import MINI, STUDENT, TEACHER

EASY = ["--dataset", "easyVQA", "--batch-size", "8", *MINI]
STAGES = {
    "PA": ["PA.py", *EASY, "--limit", "40", "--model-path-lvlm", str(TEACHER), "--temperature", "1"],
    "PI": ["PI.py", *EASY, "--model-path-lvlm", str(TEACHER), "--model-path-svlm", str(STUDENT), "--answer-all"],
    "evaluate": ["evaluate.py", *EASY, "--limit", "48", "--model-path", str(STUDENT)],
}
OUTPUTS = {
    "PA": ["PA_teacher_easyVQA"],
    "PI": ["PI_teacher_teacher_easyVQA", "PI_teacher_student_easyVQA", "PI_teacher_train_teacher_student_easyVQA"],
    "evaluate": ["Eval_student_easyVQA"],
}


def read(path):
    return json.loads(path.read_text())
