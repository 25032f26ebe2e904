"""The interactive documentation at /docs: Swagger UI, of files that this server has.

FastAPI's own page loads Swagger UI from a content delivery network, which a service behind a
firewall cannot reach, and no page should have to trust. The files are those of the package
fastapi-offline. The addresses are relative, so that it works below a proxy's prefix, too.
"""

from __future__ import annotations

import importlib.util

from fastapi import FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.staticfiles import StaticFiles

_FILES = "fastapi_offline"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_to(app: FastAPI) -> None:
    """Add /docs to an application, if the files are installed."""
    if importlib.util.find_spec(_FILES) is None:
        return
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=f"{app.title}: requests and answers",
        swagger_js_url="docs-files/swagger-ui-bundle.js",
        swagger_css_url="docs-files/swagger-ui.css",
        swagger_favicon_url="data:,",
    ).body
    app.mount("/docs-files", StaticFiles(packages=[(_FILES, "static")]))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(page, media_type="text/html", headers=_HEADERS)
