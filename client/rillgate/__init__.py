"""Rillgate's client: needs grpcio and protobuf alone, and never imports the server."""

from rillgate.async_stream import AsyncGenerationStream as AsyncGenerationStream
from rillgate.client import AsyncClient as AsyncClient
from rillgate.config import ClientConfig as ClientConfig
from rillgate.config import RetryConfig as RetryConfig
from rillgate.config import TlsConfig as TlsConfig
from rillgate.errors import RillgateError as RillgateError
from rillgate.sync_client import Client as Client
from rillgate.sync_stream import GenerationStream as GenerationStream
from rillgate.types import ChatMessage as ChatMessage
from rillgate.types import Continuation as Continuation
from rillgate.types import FinishReason as FinishReason
from rillgate.types import Generation as Generation
