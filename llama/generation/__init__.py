"""Text generation: not built yet. A KV cache will be a second AttentionContext, beside PackedDocuments."""
