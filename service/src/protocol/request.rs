//! The request for a corpus: every content setting of the consumer.

use std::path::Path;

use forebay::settings::{self, Config, Setting, SettingKind};
use forebay::{Error, Result};
use serde_json::{Value, json};

/// Content settings that belong to a position, so that a ticket carries them or the consumer alone
/// needs them.
const OF_POSITION: [&str; 2] = ["skip", "extend"];

/// Settings of other kinds that opening a corpus depends on.
const OF_OPENING: [&str; 1] = ["batch_format"];

/// Whether a request carries `setting`.
pub fn is_carried(setting: &Setting) -> bool {
    let is_content = setting.kind() == SettingKind::Content && !OF_POSITION.contains(&setting.name);
    is_content || OF_OPENING.contains(&setting.name)
}

/// A request for a corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Names and texts of the content settings, in the order of the table. Paths are absolute.
    pub settings: Vec<(String, String)>,
    /// Numbers of first shards that the answer shall describe beside the first and all.
    pub shards: Vec<u64>,
}

impl Request {
    /// The request of a consumer with `config`.
    pub fn of(config: &Config, shards: &[u64]) -> Result<Self> {
        let mut config = config.clone();
        config.data = config.data.iter().map(|path| absolute(path)).collect();
        if let Some(mixture) = &config.mixture {
            config.mixture = Some(absolute_mixture(mixture)?);
        }
        let carried = settings::all().iter().filter(|setting| is_carried(setting));
        let settings = carried.map(|setting| (setting.name.to_owned(), setting.text(&config)));
        // A mixture has no `data`.
        let settings = settings.filter(|(_, text)| !text.is_empty()).collect();
        Ok(Self { settings, shards: shards.to_vec() })
    }

    /// The request as JSON.
    pub fn to_bytes(&self) -> Vec<u8> {
        let settings: serde_json::Map<String, Value> =
            self.settings.iter().map(|(name, text)| (name.clone(), text.as_str().into())).collect();
        json!({ "version": super::VERSION, "settings": settings, "shards": self.shards }).to_string().into_bytes()
    }

    /// Parses JSON. Settings that are left out have their defaults.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let object = super::object("request", bytes)?;
        let settings = super::texts(&object, "settings")?;
        for (name, _) in &settings {
            if !settings::find(name).is_some_and(is_carried) {
                return Err(Error::config(format!("`{name}` is no content setting that a request may carry")));
            }
        }
        let shards = match object.get("shards") {
            None => Vec::new(),
            Some(value) => {
                let numbers = value.as_array().filter(|numbers| numbers.len() <= 1024);
                let numbers = numbers.and_then(|numbers| numbers.iter().map(Value::as_u64).collect());
                numbers.ok_or_else(|| Error::config("`shards` must be a list of at most 1024 whole numbers"))?
            }
        };
        Ok(Self { settings, shards })
    }

    /// The settings as a configuration.
    pub fn config(&self) -> Result<Config> {
        let mut config = Config::default();
        for (name, text) in &self.settings {
            let setting = settings::find(name).ok_or_else(|| Error::config(format!("unknown setting `{name}`")))?;
            setting.set(&mut config, text.as_str())?;
        }
        Ok(config)
    }
}

/// The path from the root, without a slash at its end. Addresses of object stores begin as they
/// are.
pub fn absolute(path: &str) -> String {
    let path = if path.len() > 1 { path.trim_end_matches('/') } else { path };
    if path.contains("://") {
        return path.to_owned();
    }
    std::path::absolute(Path::new(path)).map_or_else(|_| path.to_owned(), |path| path.to_string_lossy().into_owned())
}

/// The mixture with absolute paths.
fn absolute_mixture(text: &str) -> Result<String> {
    let refused = || Error::config("`mixture` is no JSON");
    let mut mixture: Value = serde_json::from_str(text).map_err(|_| refused())?;
    let sources = mixture.get_mut("sources").and_then(Value::as_array_mut).ok_or_else(refused)?;
    for source in sources {
        match source.get_mut("data") {
            Some(Value::String(path)) => *path = absolute(path),
            Some(Value::Array(paths)) => {
                for path in paths {
                    if let Value::String(path) = path {
                        *path = absolute(path);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(mixture.to_string())
}
