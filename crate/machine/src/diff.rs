//! Differences between two values of a saved type, field by field: whatever can be serialised is
//! flattened to `path = value` pairs, and those are compared.

use std::collections::BTreeMap;
use std::fmt;

use serde::ser::{self, Serialize};

/// A field that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Where it is: `vcpu[0].rip`.
    pub path: String,
    /// Its value in the first; `-` where there is none.
    pub before: String,
    /// Its value in the second; `-` where there is none.
    pub after: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} -> {}", self.path, self.before, self.after)
    }
}

/// What differs between `a` and `b`, in the order of the fields. Empty when they are equal.
///
/// Byte strings count as one field; where two of one length differ, the bytes around the first
/// difference are given, with its offset in the path.
pub fn diff<T: Serialize>(a: &T, b: &T) -> Vec<Change> {
    let (a, b) = (flatten(a), flatten(b));
    let index: BTreeMap<&str, &Value> = b.iter().map(|(path, v)| (path.as_str(), v)).collect();
    let known: BTreeMap<&str, ()> = a.iter().map(|(path, _)| (path.as_str(), ())).collect();
    let mut changes = Vec::new();
    for (path, before) in &a {
        match index.get(path.as_str()) {
            Some(after) if *after == before => {}
            Some(after) => changes.push(change(path, before, after)),
            None => changes.push(Change {
                path: path.clone(),
                before: before.to_string(),
                after: "-".into(),
            }),
        }
    }
    let added = b
        .iter()
        .filter(|(path, _)| !known.contains_key(path.as_str()));
    changes.extend(added.map(|(path, after)| Change {
        path: path.clone(),
        before: "-".into(),
        after: after.to_string(),
    }));
    changes
}

/// Every field of `value` as `(path, value)`, in order.
pub fn fields<T: Serialize>(value: &T) -> Vec<(String, String)> {
    flatten(value)
        .into_iter()
        .map(|(path, value)| (path, value.to_string()))
        .collect()
}

fn change(path: &str, before: &Value, after: &Value) -> Change {
    if let (Value::Bytes(a), Value::Bytes(b)) = (before, after)
        && a.len() == b.len()
        && let Some(at) = a.iter().zip(b).position(|(a, b)| a != b)
    {
        let shown = at..a.len().min(at + 8);
        return Change {
            path: format!("{path}[{at:#x}..]"),
            before: Value::Bytes(a[shown.clone()].to_vec()).to_string(),
            after: Value::Bytes(b[shown].to_vec()).to_string(),
        };
    }
    Change {
        path: path.to_owned(),
        before: before.to_string(),
        after: after.to_string(),
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Text(String),
    Bytes(Vec<u8>),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 16;
        match self {
            Value::Text(text) => f.write_str(text),
            Value::Bytes(bytes) => {
                for byte in bytes.iter().take(SHOWN) {
                    write!(f, "{byte:02x}")?;
                }
                if bytes.len() > SHOWN {
                    write!(f, ".. ({} bytes)", bytes.len())?;
                }
                Ok(())
            }
        }
    }
}

fn flatten<T: Serialize>(value: &T) -> Vec<(String, Value)> {
    let mut flat = Flat::default();
    // A saved type has nothing that can fail here.
    let outcome = value.serialize(&mut flat);
    debug_assert!(outcome.is_ok(), "{outcome:?}");
    flat.out
}

/// The serializer: keeps the path to where it is.
#[derive(Default)]
struct Flat {
    path: String,
    out: Vec<(String, Value)>,
}

/// A type whose own code refuses to be serialised.
#[derive(Debug)]
struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

impl ser::Error for Refused {
    fn custom<T: fmt::Display>(message: T) -> Refused {
        Refused(message.to_string())
    }
}

impl Flat {
    fn put(&mut self, value: impl Into<String>) -> Result<(), Refused> {
        self.out
            .push((self.path.clone(), Value::Text(value.into())));
        Ok(())
    }

    /// Serialises `value` with `step` added to the path.
    fn at<T: Serialize + ?Sized>(&mut self, step: &str, value: &T) -> Result<(), Refused> {
        let length = self.path.len();
        if !self.path.is_empty() && !step.starts_with('[') {
            self.path.push('.');
        }
        self.path.push_str(step);
        let outcome = value.serialize(&mut *self);
        self.path.truncate(length);
        outcome
    }

    fn items<'a>(&'a mut self, variant: Option<&'static str>) -> Items<'a> {
        let length = self.path.len();
        if let Some(variant) = variant {
            if !self.path.is_empty() {
                self.path.push('.');
            }
            self.path.push_str(variant);
        }
        let first = self.out.len();
        Items {
            flat: self,
            length,
            first,
            next: 0,
            bytes: Some(Vec::new()),
            key: None,
        }
    }
}

/// A sequence, tuple, map or struct that is being written.
struct Items<'a> {
    flat: &'a mut Flat,
    /// Length of the path to go back to.
    length: usize,
    /// Where its own output begins.
    first: usize,
    next: usize,
    /// Its elements as long as all of them are bytes.
    bytes: Option<Vec<u8>>,
    key: Option<String>,
}

impl Items<'_> {
    fn element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Refused> {
        if let Some(bytes) = &mut self.bytes {
            match value.serialize(OneByte) {
                Ok(byte) => {
                    bytes.push(byte);
                    return Ok(());
                }
                Err(_) => {
                    // The first element tells; later ones have its type.
                    self.bytes = None;
                }
            }
        }
        let step = format!("[{}]", self.next);
        self.next += 1;
        self.flat.at(&step, value)
    }

    fn finish(self) -> Result<(), Refused> {
        match self.bytes {
            Some(bytes) if !bytes.is_empty() => {
                let path = self.flat.path.clone();
                self.flat.out.push((path, Value::Bytes(bytes)));
            }
            _ if self.flat.out.len() == self.first => self.flat.put("empty")?,
            _ => {}
        }
        self.flat.path.truncate(self.length);
        Ok(())
    }
}

macro_rules! put {
    ($($method:ident: $type:ty = $format:literal),* $(,)?) => {
        $(fn $method(self, value: $type) -> Result<(), Refused> {
            self.put(format!($format, value))
        })*
    };
}

impl<'a> ser::Serializer for &'a mut Flat {
    type Ok = ();
    type Error = Refused;
    type SerializeSeq = Items<'a>;
    type SerializeTuple = Items<'a>;
    type SerializeTupleStruct = Items<'a>;
    type SerializeTupleVariant = Items<'a>;
    type SerializeMap = Items<'a>;
    type SerializeStruct = Items<'a>;
    type SerializeStructVariant = Items<'a>;

    put! {
        serialize_bool: bool = "{}",
        serialize_i8: i8 = "{}",
        serialize_i16: i16 = "{}",
        serialize_i32: i32 = "{}",
        serialize_i64: i64 = "{}",
        serialize_i128: i128 = "{}",
        serialize_u8: u8 = "{:#x}",
        serialize_u16: u16 = "{:#x}",
        serialize_u32: u32 = "{:#x}",
        serialize_u64: u64 = "{:#x}",
        serialize_u128: u128 = "{:#x}",
        serialize_f32: f32 = "{}",
        serialize_f64: f64 = "{}",
        serialize_char: char = "{:?}",
        serialize_str: &str = "{:?}",
    }

    fn serialize_bytes(self, bytes: &[u8]) -> Result<(), Refused> {
        let path = self.path.clone();
        self.out.push((path, Value::Bytes(bytes.to_vec())));
        Ok(())
    }

    fn serialize_none(self) -> Result<(), Refused> {
        self.put("none")
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Refused> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<(), Refused> {
        self.put("()")
    }

    fn serialize_unit_struct(self, name: &'static str) -> Result<(), Refused> {
        self.put(name)
    }

    fn serialize_unit_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
    ) -> Result<(), Refused> {
        self.put(variant)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<(), Refused> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<(), Refused> {
        self.at(variant, value)
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Items<'a>, Refused> {
        Ok(self.items(None))
    }

    fn serialize_tuple(self, _: usize) -> Result<Items<'a>, Refused> {
        Ok(self.items(None))
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Items<'a>, Refused> {
        Ok(self.items(None))
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Items<'a>, Refused> {
        Ok(self.items(Some(variant)))
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Items<'a>, Refused> {
        Ok(self.items(None))
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Items<'a>, Refused> {
        Ok(self.items(None))
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Items<'a>, Refused> {
        Ok(self.items(Some(variant)))
    }
}

macro_rules! sequence {
    ($($trait:ident :: $method:ident),* $(,)?) => {
        $(impl ser::$trait for Items<'_> {
            type Ok = ();
            type Error = Refused;

            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Refused> {
                self.element(value)
            }

            fn end(self) -> Result<(), Refused> {
                self.finish()
            }
        })*
    };
}

sequence! {
    SerializeSeq::serialize_element,
    SerializeTuple::serialize_element,
    SerializeTupleStruct::serialize_field,
    SerializeTupleVariant::serialize_field,
}

macro_rules! structure {
    ($($trait:ident),*) => {
        $(impl ser::$trait for Items<'_> {
            type Ok = ();
            type Error = Refused;

            fn serialize_field<T: Serialize + ?Sized>(
                &mut self,
                key: &'static str,
                value: &T,
            ) -> Result<(), Refused> {
                self.bytes = None;
                self.flat.at(key, value)
            }

            fn end(self) -> Result<(), Refused> {
                self.finish()
            }
        })*
    };
}

structure!(SerializeStruct, SerializeStructVariant);

impl ser::SerializeMap for Items<'_> {
    type Ok = ();
    type Error = Refused;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Refused> {
        let mut flat = Flat::default();
        key.serialize(&mut flat)?;
        let text = flat.out.first().map(|(_, value)| value.to_string());
        self.key = Some(format!("[{}]", text.unwrap_or_default()));
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Refused> {
        self.bytes = None;
        let key = self.key.take().unwrap_or_default();
        self.flat.at(&key, value)
    }

    fn end(self) -> Result<(), Refused> {
        self.finish()
    }
}

/// Takes a `u8` and refuses all else.
struct OneByte;

macro_rules! refuse {
    ($($method:ident($($type:ty),*) -> $out:ty),* $(,)?) => {
        $(fn $method(self, $(_: $type),*) -> Result<$out, Refused> {
            Err(Refused(String::new()))
        })*
    };
}

impl ser::Serializer for OneByte {
    type Ok = u8;
    type Error = Refused;
    type SerializeSeq = ser::Impossible<u8, Refused>;
    type SerializeTuple = ser::Impossible<u8, Refused>;
    type SerializeTupleStruct = ser::Impossible<u8, Refused>;
    type SerializeTupleVariant = ser::Impossible<u8, Refused>;
    type SerializeMap = ser::Impossible<u8, Refused>;
    type SerializeStruct = ser::Impossible<u8, Refused>;
    type SerializeStructVariant = ser::Impossible<u8, Refused>;

    fn serialize_u8(self, value: u8) -> Result<u8, Refused> {
        Ok(value)
    }

    refuse! {
        serialize_bool(bool) -> u8,
        serialize_i8(i8) -> u8,
        serialize_i16(i16) -> u8,
        serialize_i32(i32) -> u8,
        serialize_i64(i64) -> u8,
        serialize_i128(i128) -> u8,
        serialize_u16(u16) -> u8,
        serialize_u32(u32) -> u8,
        serialize_u64(u64) -> u8,
        serialize_u128(u128) -> u8,
        serialize_f32(f32) -> u8,
        serialize_f64(f64) -> u8,
        serialize_char(char) -> u8,
        serialize_str(&str) -> u8,
        serialize_bytes(&[u8]) -> u8,
        serialize_none() -> u8,
        serialize_unit() -> u8,
        serialize_unit_struct(&'static str) -> u8,
        serialize_unit_variant(&'static str, u32, &'static str) -> u8,
        serialize_seq(Option<usize>) -> Self::SerializeSeq,
        serialize_tuple(usize) -> Self::SerializeTuple,
        serialize_tuple_struct(&'static str, usize) -> Self::SerializeTupleStruct,
        serialize_tuple_variant(&'static str, u32, &'static str, usize)
            -> Self::SerializeTupleVariant,
        serialize_map(Option<usize>) -> Self::SerializeMap,
        serialize_struct(&'static str, usize) -> Self::SerializeStruct,
        serialize_struct_variant(&'static str, u32, &'static str, usize)
            -> Self::SerializeStructVariant,
    }

    fn serialize_some<T: Serialize + ?Sized>(self, _: &T) -> Result<u8, Refused> {
        Err(Refused(String::new()))
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: &T,
    ) -> Result<u8, Refused> {
        Err(Refused(String::new()))
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: &T,
    ) -> Result<u8, Refused> {
        Err(Refused(String::new()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Serialize;

    #[derive(Serialize, Clone, Default)]
    struct Inner {
        rip: u64,
        flag: bool,
    }

    #[derive(Serialize, Clone)]
    enum Kind {
        Plain,
        Pair(u16, u16),
        Named { at: i8 },
    }

    #[derive(Serialize, Clone)]
    struct Outer {
        vcpu: Vec<Inner>,
        memory: Vec<u8>,
        maybe: Option<u32>,
        map: BTreeMap<u64, Inner>,
        kind: Kind,
    }

    fn outer() -> Outer {
        Outer {
            vcpu: vec![
                Inner {
                    rip: 16,
                    flag: true,
                },
                Inner::default(),
            ],
            memory: vec![0; 100],
            maybe: None,
            map: BTreeMap::from([(7, Inner::default())]),
            kind: Kind::Plain,
        }
    }

    fn lines(a: &Outer, b: &Outer) -> Vec<String> {
        diff(a, b).iter().map(Change::to_string).collect()
    }

    #[test]
    fn equal_values_have_no_difference() {
        assert!(diff(&outer(), &outer()).is_empty());
    }

    #[test]
    fn every_changed_field_is_named_with_both_values() {
        let mut b = outer();
        b.vcpu[0].rip = 18;
        b.vcpu[1].flag = true;
        b.memory[40] = 0xaa;
        b.maybe = Some(3);
        b.map.insert(
            9,
            Inner {
                rip: 1,
                flag: false,
            },
        );
        b.kind = Kind::Pair(1, 2);
        assert_eq!(
            lines(&outer(), &b),
            [
                "vcpu[0].rip: 0x10 -> 0x12",
                "vcpu[1].flag: false -> true",
                "memory[0x28..]: 0000000000000000 -> aa00000000000000",
                "maybe: none -> 0x3",
                "kind: Plain -> -",
                "map[0x9].rip: - -> 0x1",
                "map[0x9].flag: - -> false",
                "kind.Pair[0]: - -> 0x1",
                "kind.Pair[1]: - -> 0x2",
            ]
        );
    }

    #[test]
    fn lengths_and_variants_count() {
        let (mut a, mut b) = (outer(), outer());
        a.vcpu.pop();
        b.memory.push(0);
        b.map.clear();
        a.kind = Kind::Named { at: -1 };
        let lines = lines(&a, &b);
        assert!(
            lines.contains(&"vcpu[1].rip: - -> 0x0".to_owned()),
            "{lines:#?}"
        );
        assert!(lines.iter().any(|line| line.contains("(101 bytes)")));
        assert!(lines.contains(&"map: - -> empty".to_owned()));
        assert!(lines.contains(&"kind.Named.at: -1 -> -".to_owned()));
    }
}
