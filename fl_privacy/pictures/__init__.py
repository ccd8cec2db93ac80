"""Pictures of what an attacker rebuilds: the original beside the raw update's and every defence's reconstruction.

Needs the extra `simulation` to draw. From an audited client, as a server in trusted mode holds it:

    from fl_privacy.pictures import draw_picture, rebuild_client

    picture = rebuild_client(context, params, task, example=row.worst_example or 0, prior=prior)
    draw_picture(picture, Path("worst.png"), title="client 3, round 1")
"""

from fl_privacy.audit.observed import SharedUpdate
from fl_privacy.pictures.drawing import draw_picture
from fl_privacy.pictures.rebuilding import Panel, Picture, rebuild, rebuild_client

__all__ = ["Panel", "Picture", "SharedUpdate", "draw_picture", "rebuild", "rebuild_client"]
