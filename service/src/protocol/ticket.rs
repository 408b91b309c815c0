//! The ticket: the batches that a consumer asks for.

use forebay::loader::served::PassStart;
use forebay::settings::{self, Config};
use forebay::{Error, Result};
use serde_json::{Value, json};

/// Settings that a ticket may carry: how positions are grouped, which are left out, and which ids
/// are refused.
const CARRIED: [&str; 12] = [
    "skip",
    "batch_size",
    "dp_rank",
    "dp_world_size",
    "epochs",
    "max_steps",
    "remainder",
    "balance",
    "pad_id",
    "pad_to_multiple",
    "prefetch_batches",
    "vocab_size",
];

/// The batches of one rank, from a position on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The handle of the corpus, from the answer to a request.
    pub handle: String,
    /// Where the batches begin, and their number.
    pub start: PassStart,
    /// Names and texts of settings that differ from their defaults.
    pub settings: Vec<(String, String)>,
}

impl Ticket {
    /// The ticket of a consumer with `config`.
    pub fn of(handle: &str, config: &Config, start: &PassStart) -> Self {
        let carried = CARRIED.iter().filter_map(|name| settings::find(name));
        let changed = carried.filter(|setting| setting.text(config) != setting.default_text());
        let settings = changed.map(|setting| (setting.name.to_owned(), setting.text(config))).collect();
        Self { handle: handle.to_owned(), start: start.clone(), settings }
    }

    /// The ticket as JSON.
    pub fn to_bytes(&self) -> Vec<u8> {
        let settings: serde_json::Map<String, Value> =
            self.settings.iter().map(|(name, text)| (name.clone(), text.as_str().into())).collect();
        let PassStart { growth, epoch, index, batches, parts } = &self.start;
        let value = json!({
            "version": super::VERSION,
            "handle": self.handle,
            "growth": growth,
            "epoch": epoch,
            "index": index,
            "batches": batches,
            "parts": parts,
            "settings": settings,
        });
        value.to_string().into_bytes()
    }

    /// Parses JSON. `growth`, `epoch`, `index`, `batches`, `parts` and every setting may be left
    /// out.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let object = super::object("ticket", bytes)?;
        let number = |key: &str, default| object.get(key).map_or(Ok(default), |_| super::number(&object, key));
        let growth = object.get("growth").map_or(Ok(""), |_| super::text(&object, "growth"))?.to_owned();
        let start = PassStart {
            growth,
            epoch: number("epoch", 0)?,
            index: number("index", 0)?,
            batches: number("batches", u64::MAX)?,
            parts: number("parts", 1)?,
        };
        let settings = object.get("settings").map_or_else(|| Ok(Vec::new()), |_| super::texts(&object, "settings"))?;
        if let Some((name, _)) = settings.iter().find(|(name, _)| !CARRIED.contains(&name.as_str())) {
            return Err(Error::config(format!(
                "`{name}` is no setting that a ticket may carry: expected {}",
                CARRIED.join(", ")
            )));
        }
        Ok(Self { handle: super::text(&object, "handle")?.to_owned(), start, settings })
    }

    /// Sets the settings of this ticket in `config`. Others get their defaults.
    pub fn apply(&self, config: &mut Config) -> Result<()> {
        let default = Config::default();
        for name in CARRIED {
            let setting = settings::find(name).expect("a name of the table");
            let given = self.settings.iter().find(|(given, _)| given == name);
            let text = given.map_or_else(|| setting.text(&default), |(_, text)| text.clone());
            setting.set(config, text.as_str())?;
        }
        let parts = self.start.parts;
        if parts == 0 || !config.batch_size.is_multiple_of(parts) {
            return Err(Error::config(format!(
                "`parts` must divide `batch_size`: found {parts} parts of {} rows",
                config.batch_size
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_reads_back() {
        let config = Config { batch_size: 6, dp_rank: Some(1), dp_world_size: Some(2), ..Config::default() };
        let start = PassStart { growth: "0:3,1:5".to_owned(), epoch: 2, index: 40, batches: 7, parts: 3 };
        let ticket = Ticket::of("a", &config, &start);
        assert_eq!(Ticket::parse(&ticket.to_bytes()).unwrap(), ticket);
        let mut read = Config { batch_size: 99, pad_id: 5, ..Config::default() };
        ticket.apply(&mut read).unwrap();
        assert_eq!(read, config);
    }

    #[test]
    fn a_damaged_ticket_is_refused() {
        let long = format!(r#"{{"version": 1, "handle": "{}"}}"#, "a".repeat(super::super::MOST_BYTES));
        for (text, words) in [
            ("", "no object"),
            ("[1]", "no object"),
            (r#"{"handle": "a"}"#, "`version`"),
            (r#"{"version": 9, "handle": "a"}"#, "version 9 of the protocol, this forebay"),
            (r#"{"version": 1}"#, "`handle`"),
            (r#"{"version": 1, "handle": "a", "index": -1}"#, "`index`"),
            (r#"{"version": 1, "handle": "a", "settings": {"data": "/etc"}}"#, "`data`"),
            (r#"{"version": 1, "handle": "a", "settings": {"seed": 1}}"#, "texts"),
            (&long, "more than"),
        ] {
            let error = Ticket::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        let ticket = Ticket::parse(br#"{"version": 1, "handle": "a", "parts": 0}"#).unwrap();
        assert!(ticket.apply(&mut Config::default()).is_err());
    }
}
