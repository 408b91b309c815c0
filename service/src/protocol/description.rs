//! The answer to a request: a handle for tickets, and the description of the corpus.

use forebay::layout::{Extent, Lost};
use forebay::loader::description::{OpenedDescription, PartDescription, SourceDescription};
use forebay::tokens::{Dtype, FieldType};
use forebay::{Error, Result};
use serde_json::{Map, Value, json};

/// The handle of an opened corpus, and its description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Name of the opened corpus at this server.
    pub handle: String,
    /// The facts that a consumer needs.
    pub description: OpenedDescription,
}

impl Answer {
    /// The answer as JSON.
    pub fn to_bytes(&self) -> Vec<u8> {
        let OpenedDescription { sources, ids, warnings } = &self.description;
        let sources: Vec<Value> = sources.iter().map(source_to_json).collect();
        let value = json!({
            "version": super::VERSION,
            "forebay": env!("CARGO_PKG_VERSION"),
            "handle": self.handle,
            "ids": ids.name(),
            "warnings": warnings,
            "sources": sources,
        });
        value.to_string().into_bytes()
    }

    /// Parses JSON.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let Ok(Value::Object(object)) = serde_json::from_slice(bytes) else {
            return Err(Error::data("the service sent no description"));
        };
        let version = super::number(&object, "version")?;
        if version != super::VERSION {
            let theirs = object.get("forebay").and_then(Value::as_str).unwrap_or("?");
            return Err(Error::config(format!(
                "the service is forebay {theirs} with version {version} of the protocol, this is forebay {} with version {}: \
                 use the same forebay on both sides",
                env!("CARGO_PKG_VERSION"),
                super::VERSION
            )));
        }
        let ids = super::text(&object, "ids")?;
        let ids = Dtype::ALL.into_iter().find(|dtype| dtype.name() == ids).ok_or_else(|| damaged("ids"))?;
        let warnings = list(&object, "warnings")?.iter().filter_map(Value::as_str).map(str::to_owned).collect();
        let sources = list(&object, "sources")?.iter().map(source_of_json).collect::<Result<_>>()?;
        let handle = super::text(&object, "handle")?.to_owned();
        Ok(Self { handle, description: OpenedDescription { sources, ids, warnings } })
    }
}

fn source_to_json(source: &SourceDescription) -> Value {
    let lost = [
        source.lost.truncated_documents,
        source.lost.truncated_tokens,
        source.lost.dropped_documents,
        source.lost.dropped_tokens,
    ];
    let fields: Vec<u8> = source.fields.iter().map(|field| field.map_or(0, FieldType::number)).collect();
    let part = |part: &PartDescription| {
        let Extent { stream_len, rows, tokens, tail_tokens } = part.extent;
        json!({
            "shards": part.shards,
            "extent": [stream_len, rows, tokens, tail_tokens],
            "fingerprint": part.fingerprint,
            "format": part.format,
            "token_column": part.token_column,
        })
    };
    json!({
        "name": source.name,
        "shards": source.shards,
        "tokens": source.tokens,
        "decodes": source.decodes,
        "fields": fields,
        "lost": lost,
        "parts": source.parts.iter().map(part).collect::<Vec<_>>(),
    })
}

fn source_of_json(value: &Value) -> Result<SourceDescription> {
    let object = value.as_object().ok_or_else(|| damaged("sources"))?;
    let field = |value: &Value| {
        let number = value.as_u64().and_then(|number| u8::try_from(number).ok()).ok_or_else(|| damaged("fields"))?;
        if number == 0 { Ok(None) } else { FieldType::of_number(number).map(Some).ok_or_else(|| damaged("fields")) }
    };
    let [truncated_documents, truncated_tokens, dropped_documents, dropped_tokens] = four(object, "lost")?;
    let part = |value: &Value| {
        let object = value.as_object().ok_or_else(|| damaged("parts"))?;
        let [stream_len, rows, tokens, tail_tokens] = four(object, "extent")?;
        Ok(PartDescription {
            shards: super::number(object, "shards")?,
            extent: Extent { stream_len, rows, tokens, tail_tokens },
            fingerprint: super::text(object, "fingerprint")?.to_owned(),
            format: super::text(object, "format")?.to_owned(),
            token_column: super::text(object, "token_column")?.to_owned(),
        })
    };
    Ok(SourceDescription {
        name: super::text(object, "name")?.to_owned(),
        shards: super::number(object, "shards")?,
        tokens: super::number(object, "tokens")?,
        decodes: object.get("decodes").and_then(Value::as_bool).ok_or_else(|| damaged("decodes"))?,
        fields: list(object, "fields")?.iter().map(field).collect::<Result<_>>()?,
        lost: Lost { truncated_documents, truncated_tokens, dropped_documents, dropped_tokens },
        parts: list(object, "parts")?.iter().map(part).collect::<Result<_>>()?,
    })
}

fn list<'a>(object: &'a Map<String, Value>, key: &str) -> Result<&'a [Value]> {
    object.get(key).and_then(Value::as_array).map(Vec::as_slice).ok_or_else(|| damaged(key))
}

fn four(object: &Map<String, Value>, key: &str) -> Result<[u64; 4]> {
    let numbers: Option<Vec<u64>> = list(object, key)?.iter().map(Value::as_u64).collect();
    numbers.and_then(|numbers| numbers.try_into().ok()).ok_or_else(|| damaged(key))
}

fn damaged(key: &str) -> Error {
    Error::data(format!("the description that the service sent is damaged at `{key}`"))
}
