// Global<T> and Shared<T>: pointers whose every access is checked.
//
// p[i] is a reference that is used up where it stands: `auto v = p[i]` would copy the reference, not the value, so using
// such a v does not compile. Name the type.
#pragma once

#include <compare>
#include <concepts>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#include "host/memory.h"
#include "host/site.h"

namespace sparseprune::simt {

template <typename T>
class Global;
template <typename T>
class Shared;
template <typename P>
class Reference;

// An index, and where in the source it is used: operators take no default arguments, but their operands' constructors do.
struct Index {
  std::ptrdiff_t value;
  Location at;

  template <std::integral I>
  Index(I i, Location location = Location::current()) : value(static_cast<std::ptrdiff_t>(i)), at(location) {
  }
  template <typename P>
    requires std::integral<typename P::Value>
  Index(Reference<P>&& i, Location location = Location::current())
      : value(static_cast<std::ptrdiff_t>(static_cast<typename P::Value>(std::move(i)))), at(location) {
  }
};

// What *p and p[i] give: converts to the value, takes one.
template <typename P>
class Reference {
 public:
  using Value = typename P::Value;

  Reference(P p, const Location& at) : p_(p), at_(at) {
  }
  Reference(const Reference&) = delete;

  operator Value() &&
    requires(!std::floating_point<Value>)
  {
    return p_.template get<Value>(alignof(Value), at_);
  }
  // To the very type: in `c ? p[i] : 0` nvcc sees a float, and so must we.
  template <std::same_as<Value> V>
  operator V() &&
    requires std::floating_point<V>
  {
    return p_.template get<V>(alignof(V), at_);
  }

  void operator=(const Value& v) && {
    set(v);
  }
  void operator=(Reference&& other) && {
    set(other.value());
  }
  template <typename U>
  void operator+=(U&& v) && {
    set(static_cast<Value>(value() + std::forward<U>(v)));
  }
  template <typename U>
  void operator-=(U&& v) && {
    set(static_cast<Value>(value() - std::forward<U>(v)));
  }
  template <typename U>
  void operator*=(U&& v) && {
    set(static_cast<Value>(value() * std::forward<U>(v)));
  }
  template <typename U>
  void operator|=(U&& v) && {
    set(static_cast<Value>(value() | std::forward<U>(v)));
  }
  template <typename U>
  void operator&=(U&& v) && {
    set(static_cast<Value>(value() & std::forward<U>(v)));
  }
  template <typename U>
  void operator^=(U&& v) && {
    set(static_cast<Value>(value() ^ std::forward<U>(v)));
  }

 private:
  Value value() const {
    return p_.template get<Value>(alignof(Value), at_);
  }
  void set(const Value& v) {
    p_.set(v, alignof(Value), at_);
  }

  P p_;
  Location at_;
};

// What both kinds share; P is the kind itself. T* p_ is an address on this machine.
template <typename P, typename T>
class Pointer {
 public:
  using Value = std::remove_const_t<T>;

  T* address() const {
    return p_;
  }
  explicit operator bool() const {
    return p_ != nullptr;
  }
  Reference<P> operator[](const Index& i) const {
    return {self() + i, i.at};
  }
  Reference<P> operator*() const {
    return {self(), Location{}};
  }

  // Pointers may point anywhere: only an access is checked.
  P operator+(const Index& i) const {
    return self().moved(i.value);
  }
  P operator-(const Index& i) const {
    return self().moved(-i.value);
  }
  P& operator+=(const Index& i) {
    return self() = self().moved(i.value);
  }
  P& operator-=(const Index& i) {
    return self() = self().moved(-i.value);
  }
  P& operator++() {
    return self() = self().moved(1);
  }
  P& operator--() {
    return self() = self().moved(-1);
  }
  P operator++(int) {
    const P before = self();
    ++*this;
    return before;
  }
  std::ptrdiff_t operator-(const P& other) const {
    return (reinterpret_cast<std::intptr_t>(p_) - reinterpret_cast<std::intptr_t>(other.p_)) /
           static_cast<std::intptr_t>(sizeof(T));
  }
  friend bool operator==(const P& a, const P& b) {
    return a.p_ == b.p_;
  }
  friend bool operator==(const P& a, std::nullptr_t) {
    return a.p_ == nullptr;
  }
  friend auto operator<=>(const P& a, const P& b) {
    return reinterpret_cast<std::uintptr_t>(a.p_) <=> reinterpret_cast<std::uintptr_t>(b.p_);
  }

 protected:
  Pointer() = default;
  explicit Pointer(T* p) : p_(p) {
  }
  // By integers: a pointer outside of its array is undefined in C++, though not on the device.
  T* moved_address(std::ptrdiff_t n) const {
    return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(p_) + static_cast<std::uintptr_t>(n) * sizeof(T));
  }

  T* p_ = nullptr;

 private:
  const P& self() const {
    return static_cast<const P&>(*this);
  }
  P& self() {
    return static_cast<P&>(*this);
  }
};

template <typename T>
class Global : public Pointer<Global<T>, T> {
  using Base = Pointer<Global<T>, T>;

 public:
  Global() = default;
  Global(std::nullptr_t) {
  }
  Global(T* p) : Base(p), extent_(find_extent(p)) {
  }
  Global(T* p, const Extent* extent) : Base(p), extent_(extent) {
  }
  template <typename U>
    requires(!std::same_as<U, T> && std::same_as<const U, T>)
  Global(const Global<U>& p) : Base(p.address()), extent_(p.extent()) {
  }

  const Extent* extent() const {
    return extent_;
  }
  Global moved(std::ptrdiff_t n) const {
    return {this->moved_address(n), extent_};
  }

  template <typename V>
  V get(unsigned align, const Location& at) const {
    read_global(extent_, this->p_, sizeof(V), align, at);
    V v;
    std::memcpy(&v, this->p_, sizeof(V));
    return v;
  }
  template <typename V>
  void set(const V& v, unsigned align, const Location& at) const {
    static_assert(!std::is_const_v<T>, "a write through a pointer to const");
    write_global(extent_, this->p_, sizeof(V), align, at);
    std::memcpy(this->p_, &v, sizeof(V));
  }

 private:
  const Extent* extent_ = nullptr;
};

template <typename T>
class Shared : public Pointer<Shared<T>, T> {
  using Base = Pointer<Shared<T>, T>;

 public:
  Shared() = default;
  Shared(std::nullptr_t) {
  }
  Shared(T* p) : Base(p) {
  }
  template <typename U>
    requires(!std::same_as<U, T> && std::same_as<const U, T>)
  Shared(const Shared<U>& p) : Base(p.address()) {
  }

  Shared moved(std::ptrdiff_t n) const {
    return this->moved_address(n);
  }

  template <typename V>
  V get(unsigned align, const Location& at) const {
    read_shared(this->p_, sizeof(V), align, at);
    V v;
    std::memcpy(&v, this->p_, sizeof(V));
    return v;
  }
  template <typename V>
  void set(const V& v, unsigned align, const Location& at) const {
    static_assert(!std::is_const_v<T>, "a write through a pointer to const");
    write_shared(this->p_, sizeof(V), align, at);
    std::memcpy(this->p_, &v, sizeof(V));
  }
};

template <typename U, typename T>
Global<U> reinterpret(const Global<T>& p) {
  static_assert(std::is_const_v<U> || !std::is_const_v<T>, "reinterpret casts no const away");
  return {reinterpret_cast<U*>(p.address()), p.extent()};
}
template <typename U, typename T>
Shared<U> reinterpret(const Shared<T>& p) {
  static_assert(std::is_const_v<U> || !std::is_const_v<T>, "reinterpret casts no const away");
  return {reinterpret_cast<U*>(p.address())};
}

}  // namespace sparseprune::simt
