//! From an `impl Filter` block to a filter's description.

use crate::arguments::Arguments;
use proc_macro2::{Ident, Span, TokenStream};
use quote::quote;
use syn::{ImplItem, ItemImpl};

/// The operations of the SDK, by number.
const OPERATIONS: [&str; 9] =
    ["read", "write", "flush", "discard", "write_zeroes", "block_status", "cache", "resize", "event"];

pub(crate) fn expand(arguments: &Arguments, block: &ItemImpl) -> syn::Result<TokenStream> {
    let Some((_, path, _)) = &block.trait_ else {
        return Err(syn::Error::new_spanned(&block.self_ty, "#[filter] stands on `impl Filter for ...`"));
    };
    if !block.generics.params.is_empty() {
        return Err(syn::Error::new_spanned(&block.generics, "a filter has no generic parameters"));
    }
    let Some(name) = &arguments.name else {
        return Err(syn::Error::new_spanned(
            path,
            "#[filter] needs name = \"...\": the driver's name in a graph",
        ));
    };
    let this = &block.self_ty;
    let (children, children_optional) = (&arguments.children, &arguments.children_optional);
    let (child_words, objects) = (&arguments.child_words, &arguments.objects);
    let has = |name: &str| {
        block.items.iter().any(|item| matches!(item, ImplItem::Fn(function) if function.sig.ident == name))
    };
    let operations = OPERATIONS.iter().filter(|name| has(name)).map(|name| {
        let name = Ident::new(name, Span::call_site());
        quote! { .#name(<#this as ::driveline_sdk::Filter>::#name) }
    });
    let (has_size, has_info, has_permissions) = (has("size"), has("info"), has("permissions"));
    let begin = has("begin").then(|| quote! { .flush(::driveline_sdk::export::begin_told::<#this>) });
    let settle = has("settle").then(|| quote! { .flush(::driveline_sdk::export::settle_told::<#this>) });
    if has("object") == objects.is_empty() {
        let text = "objects(..) names the kinds of objects that the method `object` is for: both, or neither";
        return Err(syn::Error::new_spanned(path, text));
    }
    let summary = arguments.summary.as_ref().map_or(String::new(), syn::LitStr::value);
    let (default, effects) = (arguments.default_bits(path)?, arguments.effect_bits());
    Ok(quote! {
        #block

        impl ::driveline_sdk::export::Exported for #this {
            const DECLARED: ::driveline_sdk::export::Declared = {
                static NAMES: ::driveline_sdk::export::OptionNames = ::driveline_sdk::export::OptionNames::new();
                extern "C" fn options() -> ::driveline_sdk::export::Names {
                    NAMES.of::<<#this as ::driveline_sdk::Filter>::Options>()
                }
                ::driveline_sdk::export::Declared {
                    name: #name,
                    version: ::core::env!("CARGO_PKG_VERSION"),
                    summary: #summary,
                    default: #default,
                    effects: #effects,
                    children: &[#(::driveline_sdk::export::RStr::from_str(#children)),*],
                    children_optional: &[#(::driveline_sdk::export::RStr::from_str(#children_optional)),*],
                    child_words: &[#(::driveline_sdk::export::RStr::from_str(#child_words)),*],
                    objects: &[#(::driveline_sdk::export::RStr::from_str(#objects)),*],
                    has_size: #has_size,
                    has_info: #has_info,
                    has_permissions: #has_permissions,
                    options,
                }
            };
            const OPERATIONS: ::driveline_sdk::export::OpTable<#this> =
                ::driveline_sdk::export::OpTable::new()#(#operations)*;
            const BEGIN: ::driveline_sdk::export::OpTable<#this> =
                ::driveline_sdk::export::OpTable::new()#begin;
            const SETTLE: ::driveline_sdk::export::OpTable<#this> =
                ::driveline_sdk::export::OpTable::new()#settle;
        }
    })
}
