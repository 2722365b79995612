"""The engine: turns a workflow's graph into commits, once each, whatever crashes."""
