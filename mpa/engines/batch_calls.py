"""The calls of the batch interface: the server's files and batches. Each is tried again while its failure may pass."""

import time
from collections.abc import Callable
from typing import BinaryIO

import openai

from mpa.engines.batch_file import URL
from mpa.engines.openai import OpenAIEngine
from mpa.engines.pacing import backoff
from mpa.engines.responses import Refused, Retryable, decoded
from mpa.engines.server_errors import classify_error
from mpa.files.records import InputError

PATIENCE = 1800.0  # seconds in which a call may fail, before the run ends
NOT_KNOWN_YET = 3  # times that a new file or batch may be refused: it may not be known everywhere at once


class BatchCalls(OpenAIEngine):
    """An OpenAIEngine that can make these calls. All raise InputError where the run cannot go on, and Stopped where it ends."""

    async def check(self) -> None:
        """Raises InputError for a server without batches."""
        try:
            await self._call(self.client.batches.with_raw_response.list, limit=1)
        except Refused as error:
            raise InputError(f"{self.server} has no batch interface ({error}). Leave --batch out.") from None

    async def upload(self, name: str, file: BinaryIO) -> str:
        """The id of the uploaded file, which was written to its end."""
        size = file.tell()

        async def send():
            file.seek(0)
            return await self.client.files.with_raw_response.create(file=(name, file), purpose="batch")

        def whole(raw) -> str:
            document = self._document(raw)
            if document.get("bytes", size) != size:
                raise Retryable(f"{document.get('bytes')} of {size} bytes were uploaded")
            return _id(document)

        try:
            return await self._call(send, read=whole)
        except Refused as error:
            raise InputError(f"{self.server} does not take the file of a batch: {error}.") from None

    async def create(self, file: str, token: str) -> str:
        """The id of the new batch. Raises Retryable where it may have been made; after InputError it was not."""
        create, metadata = self.client.batches.with_raw_response.create, {"mpa": token}
        what = {"input_file_id": file, "endpoint": URL, "completion_window": "24h", "metadata": metadata}
        try:
            return await self._call(
                create, read=lambda raw: _id(self._document(raw)), again=False, refusals=NOT_KNOWN_YET, **what
            )
        except Refused as error:
            raise InputError(f"{self.model}: {self.server} does not take the batch: {error}.") from None

    async def listed(self, token: str) -> str:
        """The id of the server's batch with this token, or ""."""
        after = {}
        while True:
            page = await self._call(self.client.batches.with_raw_response.list, limit=100, **after)
            batches = [b for b in page.get("data") or () if isinstance(b, dict)]
            for found in batches:
                if (found.get("metadata") or {}).get("mpa") == token:
                    return _id(found)
            if not (page.get("has_more") and batches):
                return ""
            after = {"after": _id(batches[-1])}

    async def look(self, batch: str) -> dict:
        """The batch as it is now. Raises Refused where the server does not know it."""
        return await self._call(self.client.batches.with_raw_response.retrieve, batch, refusals=NOT_KNOWN_YET)

    async def content(self, file: str) -> bytes | None:
        """A file's content; None, with a note, where it is gone."""
        content = self.client.files.with_raw_response.content
        try:
            return await self._call(content, file, read=lambda raw: raw.http_response.content, refusals=NOT_KNOWN_YET)
        except Refused as error:
            self._note(f"{self.server}: file {file} cannot be read ({error}).")
            return None

    async def delete(self, file: str, again: bool = True) -> None:
        """Delete a file, if it is there. Raises Retryable unless `again`."""
        try:
            await self._call(self.client.files.with_raw_response.delete, file, again=again)
        except Refused:
            return

    async def _call(
        self, send: Callable, *arguments, read: Callable | None = None, again: bool = True, refusals: int = 0, **options
    ):
        """What `read` (default: a JSON object) finds in the response.

        Raises Refused where it is refused more than `refusals` times. Without `again` also Retryable, unless the server has
        certainly done nothing.
        """
        tries, since = 0, time.monotonic()
        while True:
            try:
                return (read or self._document)(await send(*arguments, **options))
            except openai.APIStatusError as error:
                response = error.response
                failure = classify_error(error.status_code, response.headers, response.text, {}, self.endpoint.redact)
                if error.status_code == 501:  # not implemented
                    failure = Refused(str(failure))
            except Retryable as error:
                failure = error
            except Exception as error:  # connections, time-outs
                failure = Retryable(self._says(error))
            if isinstance(failure, Retryable) and (again or failure.rate_limit):
                if time.monotonic() - since > PATIENCE:
                    raise InputError(f"{self.server}: keeps failing: {failure}. Run the same command again later.")
                self._tell_of_first(failure)
                await self.end.sleep(backoff(min(tries, 10), failure.retry_after))
            elif isinstance(failure, Refused) and tries < refusals:
                await self.end.sleep(backoff(tries + 2, None))
            elif isinstance(failure, InputError):
                raise InputError(f"{self.model} at {self.server}: {failure}. Finished replies are kept.")
            else:
                raise failure
            tries += 1

    def _document(self, raw) -> dict:
        try:
            document = decoded(raw.http_response.text, self.endpoint.redact)
        except ValueError as error:
            raise Retryable(str(error)) from None
        if not isinstance(document, dict):
            raise Retryable(f"no object, but {str(document)[:80]!r}")
        return document


def _id(document: dict) -> str:
    if not (isinstance(document.get("id"), str) and document["id"]):
        raise Retryable(f"no id, but {str(document)[:80]!r}")
    return document["id"]
