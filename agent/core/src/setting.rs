//! Settings that are one of a few names.

/// A value that a setting does not accept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{got:?} is not one of {}", .known.join(", "))]
pub struct UnknownValue {
    /// The value.
    pub got: String,
    /// The values that the setting accepts.
    pub known: &'static [&'static str],
}

/// Gives the values of an enum the names that annotations, flags and JSON use: `name`, `Display` and `FromStr`.
macro_rules! setting_names {
    ($setting:ident { $($value:ident = $name:literal),+ }) => {
        impl $setting {
            /// The name in annotations, flags and JSON.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$value => $name),+
                }
            }
        }

        impl std::fmt::Display for $setting {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }

        impl std::str::FromStr for $setting {
            type Err = $crate::setting::UnknownValue;

            fn from_str(s: &str) -> Result<Self, Self::Err> {
                match s {
                    $($name => Ok(Self::$value),)+
                    _ => Err($crate::setting::UnknownValue {
                        got: s.to_owned(),
                        known: &[$($name),+],
                    }),
                }
            }
        }
    };
}

pub(crate) use setting_names;
