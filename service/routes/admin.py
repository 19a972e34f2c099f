"""What only the operator may do."""

from typing import Any

from fastapi import APIRouter, Request, Security

from service.keys import ApiKeys
from service.reload import Reloader, Report
from service.routes.guard import BEARER, check_key
from service.routes.problems import MEDIA_TYPE, Problem

_REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}}
    for status, description in {401: "No key, or an unknown one.", 503: "The service is stopping."}.items()
}


def make_admin_router(reloader: Reloader, keys: ApiKeys | None) -> APIRouter:
    """Make `/v1/admin`; without keys it lets nobody in."""
    router = APIRouter(prefix="/v1/admin", tags=["admin"], dependencies=[Security(BEARER)])

    @router.post("/reload", responses=_REFUSED)
    async def reload(request: Request) -> Report:
        """Serve what is in the bundles' folder by now, and let in the keys that are in their file.

        Bundles that cannot be served are in `refused`, and what their folders served before goes on.
        """
        check_key(keys, request)
        return await reloader.reload()

    return router
