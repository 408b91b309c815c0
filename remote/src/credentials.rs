//! Credentials and addresses that stand in the standard variables and files.
//!
//! The crate `object_store` reads most of them, and renews what expires. This module adds the files
//! of the AWS command line, which that crate does not read.
#![allow(clippy::disallowed_methods)] // the variables belong to the stores, not to forebay

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use object_store::CredentialProvider;
use object_store::aws::AwsCredential;

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn home(rest: &str) -> Option<PathBuf> {
    variable("HOME").map(|home| PathBuf::from(home).join(rest))
}

/// The endpoint of S3 that the environment or the profile names.
pub(crate) fn aws_endpoint() -> Option<String> {
    ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]
        .into_iter()
        .find_map(variable)
        .or_else(|| profile_value("endpoint_url"))
}

/// The region that the environment or the profile names.
pub(crate) fn aws_region() -> Option<String> {
    ["AWS_REGION", "AWS_DEFAULT_REGION"].into_iter().find_map(variable).or_else(|| profile_value("region"))
}

/// The address of an emulator of Google Cloud Storage.
pub(crate) fn google_emulator() -> Option<String> {
    let address = variable("STORAGE_EMULATOR_HOST")?;
    Some(if address.contains("://") { address } else { format!("http://{address}") })
}

/// The address of the Hub.
pub(crate) fn hub_endpoint() -> String {
    variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned())
}

/// The token for the Hub.
pub(crate) fn hub_token() -> Option<String> {
    if let Some(token) = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].into_iter().find_map(variable) {
        return Some(token.trim().to_owned());
    }
    let folder = variable("HF_HOME").map(PathBuf::from);
    let file = variable("HF_TOKEN_PATH")
        .map(PathBuf::from)
        .or_else(|| Some(folder?.join("token")))
        .or_else(|| home(".cache/huggingface/token"))?;
    let token = std::fs::read_to_string(file).ok()?;
    Some(token.trim().to_owned()).filter(|token| !token.is_empty())
}

fn profile() -> String {
    ["AWS_PROFILE", "AWS_DEFAULT_PROFILE"].into_iter().find_map(variable).unwrap_or_else(|| "default".to_owned())
}

/// The value of `key` that the configuration of the AWS command line gives the profile.
fn profile_value(key: &str) -> Option<String> {
    let file = variable("AWS_CONFIG_FILE").map(PathBuf::from).or_else(|| home(".aws/config"))?;
    let section = match profile().as_str() {
        "default" => "default".to_owned(),
        name => format!("profile {name}"),
    };
    value_in(&std::fs::read_to_string(file).ok()?, &section, key)
}

/// The value of `key` in `[section]` of a file.
fn value_in(text: &str, section: &str, key: &str) -> Option<String> {
    let mut is_inside = false;
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            is_inside = name.trim() == section;
        } else if let Some((found, value)) = line.split_once('=')
            && is_inside
            && found.trim() == key
        {
            return Some(value.trim().to_owned());
        }
    }
    None
}

/// The credentials of a profile in the file of the AWS command line. `None` if the environment
/// holds credentials, or if the file does not.
pub(crate) fn aws_profile() -> Option<Arc<dyn CredentialProvider<Credential = AwsCredential>>> {
    let elsewhere = [
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ];
    if elsewhere.into_iter().find_map(variable).is_some() {
        return None;
    }
    let file = variable("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from).or_else(|| home(".aws/credentials"))?;
    let profile = Profile { file, name: profile(), held: Mutex::new(None) };
    profile.load().ok()?;
    Some(Arc::new(profile))
}

/// A profile in a file. The file is read again when it changes, because tools write renewed
/// credentials there.
#[derive(Debug)]
struct Profile {
    file: PathBuf,
    name: String,
    held: Mutex<Option<(SystemTime, Arc<AwsCredential>)>>,
}

impl Profile {
    fn load(&self) -> Result<Arc<AwsCredential>, String> {
        let path = self.file.display();
        let cannot = |error: std::io::Error| format!("cannot read the credentials in `{path}`: {error}");
        let modified = std::fs::metadata(&self.file).and_then(|data| data.modified()).map_err(cannot)?;
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, credential)) = &*held
            && *of == modified
        {
            return Ok(Arc::clone(credential));
        }
        let text = std::fs::read_to_string(&self.file).map_err(cannot)?;
        let value = |key: &str| value_in(&text, &self.name, key);
        let missing = |key: &str| format!("`{path}` has no `{key}` for the profile `{}`", self.name);
        let credential = Arc::new(AwsCredential {
            key_id: value("aws_access_key_id").ok_or_else(|| missing("aws_access_key_id"))?,
            secret_key: value("aws_secret_access_key").ok_or_else(|| missing("aws_secret_access_key"))?,
            token: value("aws_session_token"),
        });
        *held = Some((modified, Arc::clone(&credential)));
        Ok(credential)
    }
}

#[async_trait::async_trait]
impl CredentialProvider for Profile {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        self.load().map_err(|error| object_store::Error::Unauthenticated {
            path: self.file.display().to_string(),
            source: error.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::value_in;

    #[test]
    fn a_value_is_found_in_its_section_alone() {
        let text = "[a]\nkey = 1\n\n[ b ]\n# key = 2\nother=3\nkey=x=y\n";
        assert_eq!(value_in(text, "a", "key").as_deref(), Some("1"));
        assert_eq!(value_in(text, "b", "key").as_deref(), Some("x=y"));
        assert_eq!(value_in(text, "a", "other"), None);
        assert_eq!(value_in(text, "c", "key"), None);
    }
}
