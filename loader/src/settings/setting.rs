//! One setting: its row of the table, and access to its value in [`Config`].
//!
//! The macro `settings!` turns the table into the struct [`Config`], its defaults and the list of
//! [`Setting`]s. Everything else about settings is derived from that list.

use super::config::Config;
use super::forms::{Form, Unfit};
use super::values::Value;
use crate::error::{Error, Result};

/// The part of a run that a setting influences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SettingKind {
    /// The training data and its order. A saved state belongs to them.
    Content,
    /// The grouping of positions into batches.
    Grouping,
    /// Only speed and memory.
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

/// The way in which a saved state compares a content setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// By its value.
    Always,
    /// By its value, or 0 if it is not set.
    OrZero,
    /// By its value with block shuffling. Otherwise as 0, because it has no effect.
    WithBlocks,
    /// By its value with block shuffling or several sources. Otherwise as 0.
    WithLanes,
    /// By the value that opening the corpus decided. The loader adds this value.
    AsOpened,
    /// By these other keys of the state, which describe the opened corpus. The text gives the
    /// reason.
    ByCorpus(&'static [&'static str], &'static str),
    /// By these other keys of the state, which tell the progress of the run. The text gives the
    /// reason.
    ByProgress(&'static [&'static str], &'static str),
}

/// The kind of a setting, as its row of the table gives it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Role {
    Content(Compared),
    Grouping,
    /// A grouping setting that gives the rank of this process. Every loader takes it from the
    /// environment, like operational settings.
    Rank,
    /// A grouping setting that gives the ranks that read the same rows. Every loader takes it from
    /// the environment, because it belongs to the rank.
    Peers,
    Operational,
}

/// A class of the Python package that takes settings as keywords.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taker {
    /// `forebay.Loader`, which takes all settings.
    Loader,
    /// `forebay.torch.TokenDataset`.
    TokenDataset,
    /// `forebay.torch.DataLoader`, by a keyword that torch's class does not have.
    DataLoader,
    /// `forebay.torch.DataLoader`, by a parameter of torch with the same name.
    TorchParameter,
}

/// One setting. [`super::all`] lists all of them.
#[derive(Debug)]
pub struct Setting {
    /// Name of the field in [`Config`], of the keyword in Python, and of the key in a file.
    pub name: &'static str,
    pub(crate) lines: &'static str,
    pub(crate) role: Role,
    pub(crate) takers: &'static [Taker],
    pub(crate) field: &'static dyn ConfigField,
}

impl Setting {
    /// The part of a run that the setting influences.
    pub fn kind(&self) -> SettingKind {
        match self.role {
            Role::Content(_) => SettingKind::Content,
            Role::Grouping | Role::Rank | Role::Peers => SettingKind::Grouping,
            Role::Operational => SettingKind::Operational,
        }
    }

    /// The way in which a state compares the setting. `None` if it is not a content setting.
    pub fn compared(&self) -> Option<Compared> {
        if let Role::Content(compared) = self.role { Some(compared) } else { None }
    }

    /// Whether `taker` has a keyword for the setting.
    pub fn is_taken_by(&self, taker: Taker) -> bool {
        taker == Taker::Loader || self.takers.contains(&taker)
    }

    /// Meaning of the setting and of each of its choices, as one paragraph.
    pub fn doc(&self) -> String {
        let choices = self.field.meanings().into_iter().map(|(name, doc)| format!("`{name}`: {doc}"));
        let lines = self.lines.lines().map(|line| line.trim().to_owned());
        lines.chain(choices).collect::<Vec<_>>().join(" ")
    }

    /// Accepted values, as a noun phrase.
    pub fn accepts(&self) -> String {
        self.field.accepts()
    }

    /// Type annotation in Python, without `None`.
    pub fn python(&self) -> String {
        self.field.python()
    }

    /// Whether its values are paths. In Python, a text is then one path, with any commas in it.
    pub fn takes_paths(&self) -> bool {
        self.python() == "Data"
    }

    /// Whether its value is a dtype. Other libraries have their own objects for dtypes.
    pub fn takes_dtype(&self) -> bool {
        self.python() == "npt.DTypeLike"
    }

    /// Name of the environment variable.
    pub fn variable(&self) -> String {
        format!("FOREBAY_{}", self.name.to_uppercase())
    }

    /// Default value, as text.
    pub fn default_text(&self) -> String {
        self.text(&Config::default())
    }

    /// The value in `config`, as text that [`Setting::set`] accepts.
    pub fn text(&self, config: &Config) -> String {
        self.field.text(config)
    }

    /// The value in `config`, with its type.
    pub fn value(&self, config: &Config) -> Value {
        self.field.value(config)
    }

    /// Sets the value in `config`.
    pub fn set(&self, config: &mut Config, value: impl Into<Value>) -> Result<()> {
        self.set_from(config, &value.into(), self.name)
    }

    /// Works like [`Setting::set`]. Errors name `place`, where the value was found.
    pub fn set_from(&self, config: &mut Config, value: &Value, place: &str) -> Result<()> {
        self.field.set(config, value).map_err(|unfit| match unfit {
            Unfit::Type | Unfit::Value => self.fault(place, &value.shown()),
            Unfit::Part(error) if place == self.name => error,
            Unfit::Part(error) => Error::config(format!("{error} (from `{place}`)")),
        })
    }

    /// Fails if the setting accepts no value with the type of `value`. The text is for a type
    /// error.
    pub fn check_type(&self, value: &Value) -> Result<(), String> {
        match self.field.set(&mut Config::default(), value) {
            Err(Unfit::Type) => Err(format!("`{}` must be {}, found {}", self.name, self.accepts(), value.type_name())),
            _ => Ok(()),
        }
    }

    /// Fails if `config`, which was built in Rust, holds a value that is not accepted.
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
pub(crate) trait ConfigField: Sync + std::fmt::Debug {
    fn set(&self, config: &mut Config, value: &Value) -> Result<(), Unfit>;
    fn holds(&self, config: &Config) -> bool;
    fn text(&self, config: &Config) -> String;
    fn value(&self, config: &Config) -> Value;
    fn accepts(&self) -> String;
    fn python(&self) -> String;
    fn meanings(&self) -> Vec<(&'static str, &'static str)>;
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

impl<T, F: Form<T>> ConfigField for FieldOf<T, F> {
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

    fn meanings(&self) -> Vec<(&'static str, &'static str)> {
        self.form.meanings()
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
