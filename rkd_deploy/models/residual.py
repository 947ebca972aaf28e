"""S and A as one classifier: z = h(GAP(P_S f_S + P_A f_A)).

After "Residual Knowledge Distillation" (Gao, Shen, Li, Loy, arXiv 2002.09168): the student S imitates the teacher's
feature map, the assistant A learns what S leaves over, and their maps are summed. P_S and P_A are 1x1 convolutions to
the teacher's channels. They are linear on purpose: the residual is signed, so A must not end in a ReLU, and a linear
tail folds into one matrix at export (`rkd_deploy.export.fusion`).
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from rkd_deploy.models.staged import Staged, pool


class ResidualStudent(nn.Module):
    """The network that ships: student, assistant, their adapters and one head.

    Args:
        student: S, without a head.
        assistant: A, without a head; its last map has the size of S's.
        channels: C_T, channels of the teacher's last stage map.
        num_classes: K.
    """

    def __init__(self, student: Staged, assistant: Staged, channels: int, num_classes: int) -> None:
        super().__init__()
        self.student = student
        self.assistant = assistant
        self.student_adapter = nn.Conv2d(student.channels, channels, 1)
        self.assistant_adapter = nn.Conv2d(assistant.channels, channels, 1)
        self.head = nn.Linear(channels, num_classes)
        # A adds exactly nothing before it has learnt: the sum starts at S.
        nn.init.zeros_(self.assistant_adapter.weight)
        nn.init.zeros_(cast(Tensor, self.assistant_adapter.bias))

    def student_map(self, x_NCHW: Tensor) -> Tensor:
        """P_S f_S, [N, C_T, H', W']."""
        return cast(Tensor, self.student_adapter(self.student.features(x_NCHW)[-1]))

    def assistant_map(self, x_NCHW: Tensor) -> Tensor:
        """P_A f_A, [N, C_T, H', W']."""
        return cast(Tensor, self.assistant_adapter(self.assistant.features(x_NCHW)[-1]))

    def summed_map(self, x_NCHW: Tensor) -> Tensor:
        """P_S f_S + P_A f_A, the approximation of the teacher's map, [N, C_T, H', W']."""
        return self.student_map(x_NCHW) + self.assistant_map(x_NCHW)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        return cast(Tensor, self.head(pool(self.summed_map(x_NCHW))))


class StudentAlone(nn.Module):
    """S without A, under the same head: z = h(GAP(P_S f_S)). The control that shows what A adds."""

    def __init__(self, model: ResidualStudent) -> None:
        super().__init__()
        self.student = model.student
        self.student_adapter = model.student_adapter
        self.head = model.head

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        return cast(Tensor, self.head(pool(self.student_adapter(self.student.features(x_NCHW)[-1]))))
