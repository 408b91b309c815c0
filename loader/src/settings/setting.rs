//! One setting: what the table says of it, and access to its value in [`Config`].
//!
//! The macro `settings!` turns the table into the struct [`Config`], its defaults and the list of
//! [`Setting`]s. Everything else about settings is derived from that list.

use super::config::Config;
use super::forms::{Form, Unfit};
use super::values::Value;
use crate::error::{Error, Result};

/// What a setting has an influence on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SettingKind {
    /// The data that is trained on, and its order. A saved state belongs to it.
    Content,
    /// How positions are grouped into batches.
    Grouping,
    /// Speed and memory only.
    Operational,
}

impl SettingKind {
    /// Name shown to users.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Content => "content",
            Self::Grouping => "grouping",
            Self::Operational => "operational",
        }
    }
}

/// How a saved state compares a content setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// By its value.
    Always,
    /// By its value, and as 0 where it is not set.
    OrZero,
    /// By its value where block shuffling is on, and as 0 elsewhere, where it has no effect.
    WithBlocks,
    /// By its value where block shuffling is on or sources are mixed, and as 0 elsewhere.
    WithLanes,
    /// By the value that opening the corpus came to, which the loader adds.
    AsOpened,
    /// By these other keys of the state, which describe the opened corpus, for the reason given.
    ByCorpus(&'static [&'static str], &'static str),
    /// By these other keys of the state, which tell how far the run has come, for the reason given.
    ByProgress(&'static [&'static str], &'static str),
}

/// What a row of the table says about the kind of its setting.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Role {
    Content(Compared),
    Grouping,
    /// A grouping setting that says which rank this process is. Every loader takes it from the
    /// environment, as it takes operational settings.
    Rank,
    /// A grouping setting that says which ranks read the same rows. Every loader takes it from the
    /// environment, since it belongs to the rank.
    Peers,
    Operational,
}

/// A class of the Python package that takes settings as keywords.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taker {
    /// `forebay.Loader`, which takes all.
    Loader,
    /// `forebay.torch.TokenDataset`.
    TokenDataset,
    /// `forebay.torch.DataLoader`, beside the parameters that it has from torch.
    DataLoader,
    /// `forebay.torch.DataLoader`, by a parameter of torch with the same name.
    TorchParameter,
}

/// One setting. [`super::all`] lists them.
#[derive(Debug)]
pub struct Setting {
    /// The name of the field in [`Config`], of the keyword in Python and of the key in a file.
    pub name: &'static str,
    pub(crate) lines: &'static str,
    pub(crate) role: Role,
    pub(crate) takers: &'static [Taker],
    pub(crate) field: &'static dyn Field,
}

impl Setting {
    /// What it has an influence on.
    pub fn kind(&self) -> SettingKind {
        match self.role {
            Role::Content(_) => SettingKind::Content,
            Role::Grouping | Role::Rank | Role::Peers => SettingKind::Grouping,
            Role::Operational => SettingKind::Operational,
        }
    }

    /// How a state compares it. `None` where it is no content setting.
    pub fn compared(&self) -> Option<Compared> {
        if let Role::Content(compared) = self.role { Some(compared) } else { None }
    }

    /// Whether `taker` has a keyword for it.
    pub fn is_taken_by(&self, taker: Taker) -> bool {
        taker == Taker::Loader || self.takers.contains(&taker)
    }

    /// Its meaning, as one paragraph.
    pub fn doc(&self) -> String {
        self.lines.lines().map(str::trim).collect::<Vec<_>>().join(" ")
    }

    /// Accepted values, as a noun phrase.
    pub fn accepts(&self) -> String {
        self.field.accepts()
    }

    /// Its type annotation in Python, without `None`.
    pub fn python(&self) -> String {
        self.field.python()
    }

    /// Whether its values are paths. Text of Python is then one path, whatever commas it has.
    pub fn takes_paths(&self) -> bool {
        self.python() == "Data"
    }

    /// Whether its value is a dtype, which other libraries have objects for.
    pub fn takes_dtype(&self) -> bool {
        self.python() == "npt.DTypeLike"
    }

    /// Name of its environment variable.
    pub fn variable(&self) -> String {
        format!("FOREBAY_{}", self.name.to_uppercase())
    }

    /// Its default, as text.
    pub fn default_text(&self) -> String {
        self.text(&Config::default())
    }

    /// Its value in `config`, as text that [`Setting::set`] takes.
    pub fn text(&self, config: &Config) -> String {
        self.field.text(config)
    }

    /// Its value in `config`, with its type.
    pub fn value(&self, config: &Config) -> Value {
        self.field.value(config)
    }

    /// Sets it in `config`.
    pub fn set(&self, config: &mut Config, value: impl Into<Value>) -> Result<()> {
        self.set_from(config, &value.into(), self.name)
    }

    /// As [`Setting::set`], with errors that name `place`, where the value was found.
    pub fn set_from(&self, config: &mut Config, value: &Value, place: &str) -> Result<()> {
        self.field.set(config, value).map_err(|unfit| match unfit {
            Unfit::Type | Unfit::Value => self.fault(place, &value.shown()),
            Unfit::Part(error) if place == self.name => error,
            Unfit::Part(error) => Error::config(format!("{error} (from `{place}`)")),
        })
    }

    /// Fails where the setting takes no value of the type of `value`, in words for a type error.
    pub fn check_type(&self, value: &Value) -> Result<(), String> {
        match self.field.set(&mut Config::default(), value) {
            Err(Unfit::Type) => Err(format!("`{}` must be {}, found {}", self.name, self.accepts(), value.type_name())),
            _ => Ok(()),
        }
    }

    /// Fails where a `config` that was built in Rust holds a value that is not accepted.
    pub(crate) fn check(&self, config: &Config) -> Result<()> {
        if self.field.holds(config) {
            return Ok(());
        }
        Err(self.fault(self.name, &format!("`{}`", self.text(config))))
    }

    fn fault(&self, place: &str, found: &str) -> Error {
        Error::config(format!("`{place}` must be {}, found {found}", self.accepts()))
    }
}

/// A field of [`Config`], whatever its type.
pub(crate) trait Field: Sync + std::fmt::Debug {
    fn set(&self, config: &mut Config, value: &Value) -> Result<(), Unfit>;
    fn holds(&self, config: &Config) -> bool;
    fn text(&self, config: &Config) -> String;
    fn value(&self, config: &Config) -> Value;
    fn accepts(&self) -> String;
    fn python(&self) -> String;
}

/// A field of type `T` and the form of its values.
pub(crate) struct FieldOf<T: 'static, F> {
    pub(crate) form: F,
    pub(crate) get: fn(&Config) -> &T,
    pub(crate) get_mut: fn(&mut Config) -> &mut T,
}

impl<T, F> std::fmt::Debug for FieldOf<T, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FieldOf").finish_non_exhaustive()
    }
}

impl<T, F: Form<T>> Field for FieldOf<T, F> {
    fn set(&self, config: &mut Config, value: &Value) -> Result<(), Unfit> {
        *(self.get_mut)(config) = self.form.read(value)?;
        Ok(())
    }

    fn holds(&self, config: &Config) -> bool {
        self.form.holds((self.get)(config))
    }

    fn text(&self, config: &Config) -> String {
        self.form.print((self.get)(config))
    }

    fn value(&self, config: &Config) -> Value {
        self.form.value((self.get)(config))
    }

    fn accepts(&self) -> String {
        self.form.accepts()
    }

    fn python(&self) -> String {
        self.form.python()
    }
}

/// Defines [`Config`], its defaults and the list of settings from one table.
///
/// A row is `/// doc`, then `name: Type = default, role, form, [takers];`.
macro_rules! settings {
    ($($(#[doc = $doc:literal])+ $name:ident: $type:ty = $default:expr, $role:expr, $form:expr, [$($taker:ident),*];)+) => {
        /// Every setting of a loader. Build one with struct update syntax from [`Config::default`].
        #[derive(Clone, Debug, PartialEq)]
        pub struct Config {
            $($(#[doc = $doc])+ pub $name: $type,)+
        }

        impl Default for Config {
            fn default() -> Self {
                Self { $($name: $default,)+ }
            }
        }

        /// The settings, in the order of the table.
        pub(super) static SETTINGS: &[Setting] = &[$(Setting {
            name: stringify!($name),
            lines: concat!($($doc, "\n"),+),
            role: $role,
            takers: &[$(Taker::$taker),*],
            field: &FieldOf::<$type, _> {
                form: $form,
                get: |config| &config.$name,
                get_mut: |config| &mut config.$name,
            },
        },)+];
    };
}

pub(super) use settings;
